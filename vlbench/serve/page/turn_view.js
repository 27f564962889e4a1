// A question with its pictures, and the answers of the models side by side.

import { AnswerCard } from "./answer_card.js";
import { create, createButton, name, write } from "./elements.js";
import { shuffle } from "./messages.js";
import { showThumbnails } from "./thumbnails.js";
import { letterOf, VoteBar } from "./vote_bar.js";

/** One turn of the conversation `turns`, of which it is the last when it is made. */
export class TurnView {
  /**
   * `asked`: {question, pictures, models, isBlind, options}. `events`: `onChange()` after any
   * change, `onEdit(turn, question, pictures)` when it is to be asked anew in other words or
   * with fewer pictures. With `cards`, records of `toRecord`, it is shown as it was, in their order.
   */
  constructor(turns, asked, events) {
    const { question, pictures, models, isBlind, options, cards } = asked;
    Object.assign(this, { question, pictures, models, isBlind, events });
    this.isLast = true;
    this.element = create("article", "turn");
    this.answerList = create("div", "answers");
    this.head = create("div", "asked");
    const all = [...turns, this];
    const onChange = () => this.update();
    const shown = isBlind && !cards ? shuffle(models) : models;
    this.cards = shown.map((model) => new AnswerCard(model, all, options, onChange));
    this.answers = new Map(this.cards.map((card) => [card.model.id, card.answer]));
    this.answerList.append(...this.cards.map((card) => card.element));
    this.answerList.classList.toggle("several", models.length > 1);
    this.element.append(this.head, this.answerList);
    if (isBlind) {
      this.voteBar = new VoteBar(all, this.cards, () => this.showNames());
      this.element.append(this.voteBar.element);
    }
    this.cards.forEach((card, index) => card.setName(isBlind ? letterOf(index) : null));
    this.showQuestion();
    cards?.forEach((record, index) => this.cards[index].restore(record));
  }

  /** Return what JSON can hold of it. */
  toRecord() {
    const { question, pictures, isBlind } = this;
    return { question, pictures, isBlind, cards: this.cards.map((card) => card.toRecord()) };
  }

  showQuestion() {
    const words = write(create("p", "question"), this.question);
    words.dir = "auto";
    this.editButton = createButton("edit", () => this.edit(), { help: "editHelp" });
    this.head.replaceChildren(...this.createPictures(), create("div", "", words, this.editButton));
  }

  createPictures() {
    return this.pictures.map((picture, index) => {
      const image = create("img", picture.height > picture.width ? "picture tall" : "picture");
      image.src = picture.url;
      const values = { number: index + 1, name: picture.name };
      image.alt = "";
      const figure = create("div", "frame", image);
      figure.setAttribute("role", "img");
      return name(figure, "pictureNumber", values);
    });
  }

  /** Let the question be changed in its place. */
  edit() {
    const field = name(create("textarea"), "question");
    field.value = this.question;
    field.dir = "auto";
    const pictures = [...this.pictures]; // one that the server refused can be taken away
    const thumbnails = create("ul", "thumbnails");
    showThumbnails(thumbnails, pictures, () => field.focus());
    const send = () => {
      const question = field.value.trim();
      if (question) this.events.onEdit(this, question, pictures);
    };
    const leave = () => {
      this.showQuestion();
      this.editButton.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !isComposing(event)) {
        event.stopPropagation(); // it would end answers
        leave();
      } else if (isSending(event)) {
        event.preventDefault();
        send();
      }
    });
    const buttons = create(
      "div",
      "tools",
      createButton("askAgain", send, { className: "primary" }),
      createButton("cancel", leave),
    );
    this.head.replaceChildren(create("div", "editing", thumbnails, field, buttons));
    field.focus();
  }

  /** Ask all models at once. */
  ask() {
    for (const card of this.cards) card.ask();
  }

  /** End what is coming. */
  stop() {
    for (const card of this.cards) card.stop();
  }

  /** Whether anything is coming. */
  get isRunning() {
    return this.cards.some((card) => card.isRunning);
  }

  /** Say that another question follows: answers cannot be asked for again. */
  setFollowed() {
    this.isLast = false;
    for (const card of this.cards) card.update();
  }

  update() {
    this.voteBar?.update();
    if (this.voteBar?.hasFailed && !this.isRunning && this.isBlind) this.showNames();
    this.events.onChange();
  }

  showNames() {
    this.isBlind = false;
    this.voteBar.close();
    for (const card of this.cards) card.setName(null);
  }
}

/** Whether a key goes to an input method, where Enter and Escape end or drop a word. */
export function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}

/** Whether a key asks the question: Enter alone, and not the one that ends a composed word. */
export function isSending(event) {
  return event.key === "Enter" && !event.shiftKey && !isComposing(event);
}
