// The page: one conversation with one model, or with several side by side.

import { Composer } from "./composer.js";
import { createKeyDialog, SettingsDialog } from "./dialogs.js";
import { applyLanguage, create, createButton, explain, name, say, switchLanguage } from "./elements.js";
import { keepConversation, recallConversation } from "./kept_conversation.js";
import { createModelTable, ModelList } from "./model_list.js";
import { recall, remember } from "./preferences.js";
import { getConfig, onKeyNeeded, ServerError } from "./server.js";
import { isComposing, TurnView } from "./turn_view.js";

const THEMES = ["auto", "light", "dark"];
const find = (selector) => document.querySelector(selector);
const conversation = find("#conversation");
const blindBox = find("#blind input");
const settings = new SettingsDialog(find("#settings"));
const composer = new Composer(find("#composer"), { onAsk: ask, onStop: stop });
let turns = [];
let modelList = null;

async function start() {
  applyLanguage();
  showTheme(recall("theme", "auto"));
  find("#language").addEventListener("click", switchLanguage);
  find("#theme").addEventListener("click", nextTheme);
  find("#open-settings").addEventListener("click", () => settings.open());
  find("#new").addEventListener("click", beginConversation);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !isComposing(event) && !find("dialog[open]")) stop();
  });
  window.addEventListener("beforeunload", (event) => {
    if (!keepTurns()) event.preventDefault(); // the conversation is nowhere else: ask first
  });
  window.addEventListener("pagehide", keepTurns); // telephones tell no more than this
  composer.setRunning(false);
  onKeyNeeded(createKeyDialog(find("#key")));
  await connect();
}

async function connect() {
  try {
    const { models, votes } = await getConfig();
    modelList = new ModelList(find("#models"), models, showBlindSwitch);
    blindBox.checked = recall("blind", false);
    blindBox.addEventListener("change", () => remember("blind", blindBox.checked));
    find("#blind").dataset.votes = String(votes);
    showBlindSwitch();
    const kept = recallConversation(modelList.models);
    beginConversation();
    restoreConversation(kept);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    const again = createButton("retry", connect, { className: "primary" });
    const words = say(create("p", "note wrong"), error.key, error.values);
    conversation.replaceChildren(create("div", "intro", words, again));
  }
}

function showBlindSwitch() {
  const isArena = modelList.chosen().length > 1;
  find("#blind").hidden = !(isArena && find("#blind").dataset.votes === "true");
}

function beginConversation() {
  for (const turn of turns) turn.stop();
  turns = [];
  const { models } = modelList;
  const kind = models.length > 1 ? "introSeveral" : "introOne";
  const choose = createButton("choosePicture", () => composer.chooseFiles(), { className: "primary" });
  const intro = create("div", "intro");
  intro.append(
    say(create("h2"), kind),
    say(create("p", "faint"), `${kind}Text`),
    choose,
    createModelTable(models),
  );
  conversation.replaceChildren(intro);
  showState();
  composer.field.focus();
}

/** Keep the conversation for a reload; return whether nothing is lost by one. */
function keepTurns() {
  return keepConversation(turns) && !turns.some((turn) => turn.isRunning);
}

/** Show the turns again that were kept before a reload. */
function restoreConversation(records) {
  for (const record of records) {
    const models = record.cards.map(({ id }) => modelList.models.find((model) => model.id === id));
    addTurn({ ...record, models });
  }
  turns.at(-1)?.element.scrollIntoView({ block: "start", behavior: "instant" });
}

/** Ask the chosen models; the question follows the present conversation. Return whether it was. */
function ask(question, pictures) {
  if (!modelList) {
    connect(); // the server was away
    return false;
  }
  const models = modelList.chosen();
  const isBlind = blindBox.checked && !find("#blind").hidden;
  const turn = addTurn({ question, pictures, models, isBlind });
  turn.ask();
  turn.element.scrollIntoView({ block: "start" });
  return true;
}

/** Append a turn to the conversation, and return it. */
function addTurn(asked) {
  if (!turns.length) conversation.replaceChildren();
  turns.at(-1)?.setFollowed();
  const options = () => settings.values();
  const events = { onChange: followAnswers, onEdit: editTurn };
  const turn = new TurnView(turns, { ...asked, options }, events);
  turns = [...turns, turn];
  conversation.append(turn.element);
  return turn;
}

/** Cut the conversation at a turn, and ask it anew in other words or with fewer pictures. */
function editTurn(turn, question, pictures) {
  const kept = turns.slice(0, turns.indexOf(turn));
  for (const removed of turns.slice(kept.length)) {
    removed.stop();
    removed.element.remove();
  }
  turns = kept;
  ask(question, pictures);
  composer.field.focus();
}

function stop() {
  for (const turn of turns) turn.stop();
}

function followAnswers() {
  const page = document.scrollingElement;
  const distance = page.scrollHeight - page.scrollTop - page.clientHeight;
  showState();
  if (distance < 80) page.scrollTop = page.scrollHeight; // the person reads at the end
}

function showState() {
  composer.setRunning(turns.some((turn) => turn.isRunning));
  document.body.classList.toggle("arena", modelList.models.length > 1);
}

function showTheme(theme) {
  const shown = THEMES.includes(theme) ? theme : "auto";
  document.documentElement.dataset.theme = shown;
  name(find("#theme"), `theme_${shown}`);
  explain(find("#theme"), `theme_${shown}`);
}

function nextTheme() {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % 3];
  remember("theme", next);
  showTheme(next);
}

start();
