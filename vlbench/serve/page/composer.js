// Where a question is typed and pictures are added: chosen, pasted or dropped.

import { say } from "./elements.js";
import { readPicture } from "./pictures.js";
import { showThumbnails } from "./thumbnails.js";
import { isSending } from "./turn_view.js";

/** The form at the foot of the page. */
export class Composer {
  /** `onAsk(question, pictures)` returns whether it was asked; `onStop()` ends answers. */
  constructor(form, { onAsk, onStop }) {
    Object.assign(this, { form, onAsk, onStop, pictures: [], isSending: false });
    this.reading = true; // or a promise of whether the files that are being read are pictures
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

  /** Add pictures to the next question, which waits until they have been read. */
  addFiles(files) {
    const reading = Promise.all([this.reading, this.readFiles(files)]);
    const outcome = reading.then((results) => results.every(Boolean));
    this.reading = outcome;
    outcome.then(() => {
      if (this.reading === outcome) this.reading = true;
    });
  }

  /** Return whether all files are pictures; say which are none. */
  async readFiles(files) {
    this.tell(null);
    const pictures = await Promise.all(files.map(readPicture));
    this.pictures.push(...pictures.filter(Boolean));
    const others = files.filter((_, index) => !pictures[index]).map((file) => file.name);
    const values = { name: others.join(", ") };
    if (others.length) this.tell(others.length > 1 ? "notPictures" : "notPicture", values);
    this.showPictures();
    this.field.focus();
    return others.length === 0;
  }

  showPictures() {
    showThumbnails(this.list, this.pictures, () => this.field.focus());
  }

  /** Say a failure below the field; null removes it. */
  tell(key, values) {
    this.note.hidden = key === null;
    if (key) say(this.note, key, values);
  }

  async send() {
    if (this.isRunning) return this.onStop();
    if (this.isSending) return; // Enter once more while pictures are read
    this.isSending = true;
    const isComplete = await this.reading;
    this.isSending = false;
    if (!isComplete) return; // a file that was to go with the question is no picture
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
