// The two dialogs: settings of the answers, and the key that a server may ask for.

import { say } from "./elements.js";
import { recall, remember } from "./preferences.js";

const DEFAULTS = { maxTokens: 512, temperature: 0, topP: 1, seed: 0 }; // as of `chat`

/** The settings of the answers, as the dialog shows them; remembered by the browser. */
export class SettingsDialog {
  constructor(dialog) {
    this.dialog = dialog;
    this.fields = [...dialog.querySelectorAll("input")];
    this.fill(recall("settings", DEFAULTS));
    dialog.querySelector(".defaults").addEventListener("click", () => this.fill(DEFAULTS));
    dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault(); // a field out of range has been marked by the browser by now
      dialog.close();
    });
    dialog.addEventListener("cancel", (event) => {
      if (this.fields.every((field) => field.reportValidity())) return;
      event.preventDefault();
    });
    dialog.addEventListener("close", () => remember("settings", this.values()));
  }

  fill(values) {
    for (const field of this.fields) {
      field.value = values?.[field.name] ?? DEFAULTS[field.name];
      if (!field.checkValidity()) field.value = DEFAULTS[field.name];
    }
  }

  /** Return {maxTokens, temperature, topP, seed}. */
  values() {
    return Object.fromEntries(this.fields.map((field) => [field.name, field.valueAsNumber]));
  }

  open() {
    this.dialog.showModal();
  }
}

/** Return what asks for the server's key: `ask(isRefused)` gives the key, "" if none is given. */
export function createKeyDialog(dialog) {
  const field = dialog.querySelector("input");
  const form = dialog.querySelector("form");
  return (isRefused) =>
    new Promise((resolve) => {
      say(dialog.querySelector("h2"), isRefused ? "keyWrong" : "keyTitle");
      field.value = "";
      let given = "";
      form.onsubmit = (event) => {
        event.preventDefault();
        given = field.value.trim();
        dialog.close();
      };
      dialog.querySelector(".cancel").onclick = () => dialog.close();
      dialog.onclose = () => resolve(given);
      dialog.showModal();
    });
}
