// Elements and their words. Words of models, files and servers only ever become text nodes.

import english from "./texts_en.js";
import chinese from "./texts_zh.js";
import { recall, remember } from "./preferences.js";

const LANGUAGES = { en: english, zh: chinese };
const spoken = new WeakMap(); // element -> {text: [key, values], label: [key, values], ...}
let language = firstLanguage();

function firstLanguage() {
  const fallback = navigator.language.startsWith("zh") ? "zh" : "en";
  const chosen = recall("language", fallback);
  return chosen in LANGUAGES ? chosen : fallback;
}

/** Return the words of a key in the present language; values of {name} are inserted as they are. */
export function translate(key, values = {}) {
  return LANGUAGES[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Switch to the other language, and say everything anew. */
export function switchLanguage() {
  language = language === "en" ? "zh" : "en";
  remember("language", language);
  applyLanguage();
}

/** Say everything on the page in the present language. */
export function applyLanguage() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("*")) {
    const { text, label, help, placeholder } = element.dataset;
    const known = spoken.get(element) ?? {};
    if (text) say(element, text);
    if (label) name(element, label);
    if (help) element.title = translate(help);
    if (placeholder) element.placeholder = translate(placeholder);
    for (const write of Object.values(known)) write();
  }
}

function speak(element, place, write) {
  spoken.set(element, { ...spoken.get(element), [place]: write });
  write();
  return element;
}

/** Let an element say a key, now and when the language changes. Return the element. */
export function say(element, key, values) {
  return speak(element, "text", () => (element.textContent = translate(key, values)));
}

/** Let an element be named by a key for those who do not see it. Return the element. */
export function name(element, key, values) {
  return speak(element, "label", () => element.setAttribute("aria-label", translate(key, values)));
}

/** Explain an element by a key, where a pointer rests on it. Return the element. */
export function explain(element, key, values) {
  return speak(element, "help", () => (element.title = translate(key, values)));
}

/** Write a text that `compose` returns, now and when the language changes. */
export function sayComposed(element, compose) {
  return speak(element, "text", () => (element.textContent = compose()));
}

/** Write a text that is the same in every language. Return the element. */
export function write(element, text) {
  return speak(element, "text", () => (element.textContent = text));
}

/** Return a new element with a class and children, which are elements or texts. */
export function create(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** Return a new button that says a key, with its explanation. */
export function createButton(key, action, { values, help, className = "link" } = {}) {
  const button = say(create("button", className), key, values);
  button.type = "button";
  button.addEventListener("click", action);
  if (help) explain(button, help);
  return button;
}
