// Where a question is typed and pictures are added: chosen, pasted or dropped.

import { create, explain, name, say } from "./elements.js";
import { readPicture } from "./pictures.js";
import { isSending } from "./turn_view.js";

/** The form at the foot of the page. */
export class Composer {
  /** `onAsk(question, pictures)` returns whether it was asked; `onStop()` ends answers. */
  constructor(form, { onAsk, onStop }) {
    Object.assign(this, { form, onAsk, onStop, pictures: [] });
    this.field = form.querySelector("textarea");
    this.list = form.querySelector(".thumbnails");
    this.file = form.querySelector("input[type=file]");
    this.button = form.querySelector("button[type=submit]");
    this.note = form.querySelector(".note");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.field.addEventListener("keydown", (event) => {
      if (!isSending(event)) return;
      event.preventDefault();
      if (!this.isRunning) this.send();
    });
    this.field.addEventListener("input", () => this.fitField());
    this.file.addEventListener("change", () => {
      this.addFiles([...this.file.files]);
      this.file.value = ""; // so that the same file can be chosen again
    });
    this.acceptPasted();
    this.acceptDropped();
  }

  acceptPasted() {
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (!files.length) return;
      event.preventDefault();
      this.addFiles(files);
    });
  }

  acceptDropped() {
    const { body } = document;
    const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
    body.addEventListener("dragover", (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault(); // without it the browser would open the file
      body.classList.add("dropping");
    });
    body.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) body.classList.remove("dropping");
    });
    body.addEventListener("drop", (event) => {
      body.classList.remove("dropping");
      if (!holdsFiles(event)) return;
      event.preventDefault();
      this.addFiles([...event.dataTransfer.files]);
    });
  }

  /** Let the person choose files. */
  chooseFiles() {
    this.file.click();
  }

  /** Add pictures to the next question; say so of a file that is none. */
  async addFiles(files) {
    this.tell(null);
    for (const file of files) {
      const picture = await readPicture(file);
      if (picture) this.pictures.push(picture);
      else this.tell("notPicture", { name: file.name });
    }
    this.showPictures();
    this.field.focus();
  }

  showPictures() {
    const items = this.pictures.map((picture, index) => {
      const image = create("img");
      image.src = picture.url;
      image.alt = "";
      const button = create("button", "thumbnail", image);
      button.type = "button";
      name(button, "removePicture", { name: picture.name });
      explain(button, "removePicture", { name: picture.name });
      button.addEventListener("click", () => {
        this.pictures.splice(index, 1);
        this.showPictures();
        this.field.focus();
      });
      return create("li", "", button);
    });
    this.list.replaceChildren(...items);
    this.list.hidden = items.length === 0;
  }

  /** Say a failure below the field; null removes it. */
  tell(key, values) {
    this.note.hidden = key === null;
    if (key) say(this.note, key, values);
  }

  send() {
    if (this.isRunning) return this.onStop();
    const question = this.field.value.trim();
    if (!question) return this.tell("noQuestion");
    if (this.onAsk(question, this.pictures)) this.clear();
  }

  /** Forget what was typed and added. */
  clear() {
    this.field.value = "";
    this.pictures = [];
    this.tell(null);
    this.showPictures();
    this.fitField();
  }

  /** Show whether the button asks or stops. */
  setRunning(isRunning) {
    if (this.isRunning === isRunning) return;
    this.isRunning = isRunning;
    say(this.button, isRunning ? "stop" : "ask");
  }

  fitField() {
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight + 2}px`;
  }
}
