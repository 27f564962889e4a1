// One answer on the page: its words, what it cost, and what can be asked about it.

import { AnswerRun } from "./answer_run.js";
import { create, createButton, explain, name, say, sayComposed, translate, write } from "./elements.js";
import { HeatView } from "./heat_view.js";
import { allPictures, composeMessages, countFlops, formatFlops, formatSeconds } from "./messages.js";
import { blankPicture } from "./pictures.js";
import { getHeatMap } from "./server.js";

/** The answer of one model to the last question of `turns`. */
export class AnswerCard {
  /** `options()` returns the settings of answers; `onChange()` is called whenever the answer changes. */
  constructor(model, turns, options, onChange) {
    Object.assign(this, { model, turns, options, onChange });
    this.attempt = 0;
    this.answer = new AnswerRun(() => this.update());
    this.blank = new AnswerRun(() => this.updateBlank());
    this.title = create("h3");
    this.words = create("p", "words");
    this.words.setAttribute("aria-live", "polite");
    this.words.dir = "auto";
    this.note = create("p", "note");
    this.metrics = create("p", "metrics");
    this.tools = create("div", "tools");
    this.element = create("section", "answer");
    this.element.append(this.title, this.words, this.note, this.metrics, this.tools);
    explain(this.metrics, "metricsHelp");
    this.createTools();
  }

  createTools() {
    this.retryButton = createButton("retry", () => this.retry(), { help: "retryHelp" });
    this.blankButton = createButton("blank", () => this.askBlank(), { help: "blankHelp" });
    this.heatButton = createButton("heatMap", () => this.showHeatMap(), { help: "heatMapHelp" });
    this.tools.append(this.retryButton, this.blankButton, this.heatButton);
  }

  /** Show the model's name, or with a letter that alone, without what would give it away. */
  setName(letter) {
    this.isAnonymous = letter !== null;
    if (this.isAnonymous) {
      say(this.title, "anonymous", { letter });
      name(this.element, "anonymous", { letter });
    } else {
      write(this.title, this.model.id);
      name(this.element, "answerOf", { name: this.model.id });
    }
    this.update();
  }

  question(replacePicture) {
    const { maxTokens, temperature, topP, seed } = this.settings;
    return {
      model: this.model.id,
      messages: composeMessages(this.model.id, this.turns, replacePicture),
      max_tokens: maxTokens,
      temperature,
      top_p: topP,
      seed: seed + this.attempt,
    };
  }

  /** Ask the model. */
  ask() {
    this.blank.stop();
    this.blankBox?.remove();
    this.heatBox?.remove();
    this.settings = this.options(); // what is asked about the answer later has the same
    return this.answer.run(this.question());
  }

  retry() {
    this.attempt += 1;
    return this.ask();
  }

  /** End what is coming. */
  stop() {
    this.answer.stop();
    this.blank.stop();
  }

  /** Whether anything is coming. */
  get isRunning() {
    return this.answer.isRunning || (this.hasBlank && this.blank.isRunning);
  }

  get hasBlank() {
    return this.blankBox?.isConnected ?? false;
  }

  update() {
    const { answer } = this;
    this.words.setAttribute("aria-busy", String(answer.isRunning));
    this.element.classList.toggle("coming", answer.isRunning);
    if (answer.text || !answer.isRunning) write(this.words, answer.text);
    else say(this.words, "waiting");
    this.words.classList.toggle("faint", !answer.text);
    sayEnding(this.note, answer);
    this.updateMetrics();
    const isLast = this.turns.at(-1).isLast;
    const isAsked = !answer.isRunning && !this.isAnonymous;
    const hasPicture = allPictures(this.turns).length > 0;
    this.retryButton.hidden = !(isAsked && isLast);
    this.blankButton.hidden = !(isAsked && hasPicture && answer.text);
    this.heatButton.hidden = !(isAsked && hasPicture && answer.text);
    this.onChange();
  }

  updateMetrics() {
    const { answer, model, isAnonymous } = this;
    this.metrics.hidden = isAnonymous || answer.seconds === null || !answer.text;
    if (this.metrics.hidden) return;
    sayComposed(this.metrics, () => {
      const parts = [translate("seconds", { seconds: formatSeconds(answer.seconds) })];
      if (answer.usage) {
        const flops = countFlops(model.flops, answer.usage);
        parts.push(translateCount("visualToken", "visualTokens", visualTokens(answer.usage)));
        parts.push(formatFlops(flops));
        parts.push(translateCount("answerToken", "answerTokens", answer.usage.completion_tokens));
      }
      return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
    });
  }

  /** Ask the same with a blank picture; its answer is shown beside. */
  async askBlank() {
    const colour = this.model.blank_colour;
    this.blankWords = create("p", "words");
    this.blankWords.setAttribute("aria-live", "polite");
    this.blankWords.dir = "auto";
    this.blankNote = create("p", "note");
    const swatch = create("span", "swatch");
    swatch.style.backgroundColor = `rgb(${colour.join(" ")})`;
    const heading = create("h4", "", swatch, say(create("span"), "withBlank"));
    this.blankBox?.remove();
    this.blankBox = create("div", "blank", heading, this.blankWords, this.blankNote);
    this.tools.after(this.blankBox);
    this.blankButton.disabled = true;
    await this.blank.run(this.question((picture) => blankPicture(picture, colour)));
    this.blankButton.disabled = false;
  }

  updateBlank() {
    const { answer, blank } = this;
    this.blankWords.setAttribute("aria-busy", String(blank.isRunning));
    if (blank.text || !blank.isRunning) write(this.blankWords, blank.text);
    else say(this.blankWords, "waiting");
    sayEnding(this.blankNote, blank);
    if (blank.isDone && blank.text) {
      this.blankNote.hidden = false;
      say(this.blankNote, blank.text === answer.text ? "blankSame" : "blankOther");
    }
    this.onChange();
  }

  /** Show which patches of the pictures the answer depends on. */
  async showHeatMap() {
    const pictures = allPictures(this.turns);
    const { messages } = this.question();
    const asked = { model: this.model.id, messages, answer: this.answer.text };
    const view = new HeatView(pictures, (image) => getHeatMap({ ...asked, image }));
    this.heatBox?.remove();
    this.heatBox = view.element;
    this.element.append(this.heatBox);
    this.heatButton.disabled = true;
    try {
      await view.show(pictures.length - 1);
    } finally {
      this.heatButton.disabled = false;
    }
  }

  /** Return what JSON can hold of it. */
  toRecord() {
    const { attempt, settings } = this;
    return { id: this.model.id, answer: this.answer.toRecord(), attempt, settings };
  }

  /** Show an answer again that `toRecord` gave. */
  restore({ answer, attempt, settings }) {
    Object.assign(this, { attempt, settings });
    this.answer.restore(answer);
  }
}

function translateCount(one, several, count) {
  return translate(count === 1 ? one : several, { count });
}

function visualTokens(usage) {
  return usage.prompt_tokens_details?.visual_tokens ?? 0;
}

function sayEnding(note, answer) {
  note.hidden = true;
  note.classList.toggle("wrong", answer.state === "failed");
  const tell = (key, values) => {
    note.hidden = false;
    say(note, key, values);
  };
  if (answer.state === "failed") tell(answer.error.key, answer.error.values);
  else if (answer.state === "stopped") tell("stopped");
  else if (answer.isDone && !answer.text) tell("emptyAnswer");
  else if (answer.isDone && answer.finish === "length") tell("cutAtLength");
  else write(note, "");
}
