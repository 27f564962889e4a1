// What the browser remembers between visits: language, colours and settings of the answers.

const PREFIX = "vlbench.";

/** Return what was remembered under a name, `fallback` where nothing is. */
export function recall(name, fallback) {
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback; // storage is forbidden, or holds what we did not write
  }
}

/** Remember a value that JSON can hold. */
export function remember(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // storage is forbidden or full: the choice holds until the page is left
  }
}
