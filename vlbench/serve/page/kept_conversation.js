// The conversation, which the browser keeps as long as the tab is open: a reload does not lose it.

const PLACE = "vlbench.conversation";

/** Keep the turns in the place of others; return whether it was possible: there is little room. */
export function keepConversation(turns) {
  try {
    sessionStorage.removeItem(PLACE);
    const records = turns.map((turn) => turn.toRecord());
    if (turns.length) sessionStorage.setItem(PLACE, JSON.stringify(records));
    return true;
  } catch {
    return false; // storage is forbidden, or the pictures are too large
  }
}

/** Return the records of the turns that were kept; none where a model of theirs is not served. */
export function recallConversation(models) {
  const isServed = ({ id }) => models.some((model) => model.id === id);
  try {
    const records = JSON.parse(sessionStorage.getItem(PLACE)) ?? [];
    return records.every(({ cards }) => cards.every(isServed)) ? records : [];
  } catch {
    return []; // storage is forbidden, or holds what another version has written
  }
}
