// One answer while it comes: asked, streamed, stopped, failed.

import { ServerError, streamAnswer } from "./server.js";

/** An answer of a model to one question; `onChange(answer)` is called whenever it has changed. */
export class AnswerRun {
  constructor(onChange) {
    this.onChange = onChange;
    this.reset();
  }

  /** Forget what was answered. */
  reset() {
    this.text = "";
    this.state = "waiting"; // streaming, done, stopped, failed
    this.finish = this.usage = this.error = this.seconds = null;
    this.abort = new AbortController();
  }

  /** Whether it is still to come, or coming. */
  get isRunning() {
    return this.state === "waiting" || this.state === "streaming";
  }

  /** Whether it ended by itself. */
  get isDone() {
    return this.state === "done";
  }

  /** Ask, and keep what comes; never throws. */
  async run(question) {
    this.reset();
    this.onChange(this);
    const begin = performance.now();
    const sinceBegin = () => (performance.now() - begin) / 1000;
    const { signal } = this.abort;
    try {
      for await (const piece of streamAnswer(question, signal)) {
        if (piece.text) {
          this.text += piece.text;
          this.state = "streaming";
        }
        this.usage = piece.usage ?? this.usage;
        this.finish = piece.finish ?? this.finish;
        this.onChange(this);
      }
      this.state = "done";
    } catch (error) {
      this.fail(error, signal);
    }
    this.seconds = sinceBegin();
    this.onChange(this);
  }

  /** Return what JSON can hold of it; what was coming has stopped. */
  toRecord() {
    const { text, finish, usage, seconds, error } = this;
    const told = error && { key: error.key, values: error.values };
    return { text, state: this.isRunning ? "stopped" : this.state, finish, usage, seconds, error: told };
  }

  /** Be as `toRecord` told. */
  restore(record) {
    Object.assign(this, record);
    this.onChange(this);
  }

  fail(error, signal) {
    if (signal.aborted) {
      this.state = "stopped";
      return;
    }
    this.state = "failed";
    if (!(error instanceof ServerError)) console.error(error); // a fault of ours or of a chunk
    this.error = error instanceof ServerError ? error : new ServerError("errorLost");
  }

  /** End it here; what has come is kept. */
  stop() {
    if (this.isRunning) this.abort.abort();
  }
}
