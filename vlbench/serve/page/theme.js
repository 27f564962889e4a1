// Before the first paint: colours other than the system's, if the person chose them.
// A classic script, as modules run after the page has been drawn.

try {
  const chosen = JSON.parse(localStorage.getItem("vlbench.theme"));
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // storage is forbidden: the system's colours
}
