// The vote on answers without names: which is best, or none. Names are shown afterwards.

import { create, createButton, name, say, sayComposed, translate } from "./elements.js";
import { allPictures } from "./messages.js";
import { sendVote, ServerError } from "./server.js";

/** Return the letter of the answer at a place, from A. */
export function letterOf(index) {
  return String.fromCharCode(65 + index);
}

/** The bar below the answers to the last question of `turns`. */
export class VoteBar {
  /** `cards` are in the order shown; `onVoted()` is called once the vote has been written. */
  constructor(turns, cards, onVoted) {
    Object.assign(this, { turns, cards, onVoted });
    this.element = create("div", "vote");
    this.element.setAttribute("role", "group");
    name(this.element, "vote");
    this.prompt = create("p");
    this.choices = create("div", "choices", ...this.createChoices());
    this.note = create("p", "note wrong");
    this.note.hidden = true;
    this.element.append(this.prompt, this.choices, this.note);
    this.update();
  }

  createChoices() {
    const word = this.cards.length === 2 ? "better" : "best";
    const button = (choice, key, values) =>
      createButton(key, () => this.vote(choice, key, values), { values, className: "choice" });
    return [
      ...this.cards.map((_, index) => button(index, word, { letter: letterOf(index) })),
      button("tie", "tie"),
      button("bad", this.cards.length === 2 ? "bothBad" : "allBad"),
    ];
  }

  /** Whether an answer is missing, so that there can be no vote. */
  get hasFailed() {
    return this.cards.some(({ answer }) => answer.state === "failed" || answer.state === "stopped");
  }

  /** End the vote: the names have been seen, so that a later one would not be blind. */
  close() {
    this.isClosed = true;
    this.update();
  }

  /** Follow the answers: a vote needs all of them. */
  update() {
    const isReady = this.cards.every(({ answer }) => answer.isDone);
    for (const button of this.choices.children) button.disabled = !isReady || this.isSending;
    const isOver = this.isClosed || this.hasFailed;
    this.choices.hidden = isOver;
    say(this.prompt, isOver ? "voteFailed" : isReady ? "vote" : "voteWaiting");
  }

  async vote(choice, key, values) {
    this.isSending = true;
    this.note.hidden = true;
    this.update();
    try {
      await sendVote({
        models: this.cards.map((card) => card.model.id),
        question: this.turns.at(-1).question,
        images: allPictures(this.turns).map((picture) => picture.url),
        answers: this.cards.map((card) => card.answer.text),
        choice,
      });
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.note.hidden = false;
      say(this.note, error.key, error.values);
      this.isSending = false;
      this.update();
      return;
    }
    const told = create("p", "faint");
    told.setAttribute("role", "status");
    const best = this.cards[choice]?.model.id; // the letters are gone, names stand in their place
    const outcome = best === undefined ? "voted" : "votedFor";
    sayComposed(told, () => translate(outcome, { choice: translate(key, values), name: best }));
    this.element.replaceChildren(told);
    told.tabIndex = -1;
    told.focus(); // the button that had it is gone
    this.onVoted();
  }
}
