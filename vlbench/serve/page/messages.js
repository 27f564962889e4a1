// A conversation as the API takes it, and what an answer cost.
//
// A turn is {question, pictures, answers}: `answers` is a Map from a model's name to its answer,
// {text, state, ...}. Each model goes on from its own answers.

/** Return the messages that ask a model the question of the last of `turns`. */
export function composeMessages(modelName, turns, replacePicture = (picture) => picture) {
  const messages = [];
  let carried = []; // pictures of questions that this model has not answered
  for (const [number, turn] of turns.entries()) {
    const isLast = number === turns.length - 1;
    const answer = turn.answers.get(modelName)?.text;
    const pictures = [...carried, ...turn.pictures];
    carried = isLast || answer ? [] : pictures;
    if (!isLast && !answer) continue;
    messages.push({ role: "user", content: composeContent(pictures.map(replacePicture), turn) });
    if (!isLast) messages.push({ role: "assistant", content: answer });
  }
  return messages;
}

function composeContent(pictures, turn) {
  const images = pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return [...images, { type: "text", text: turn.question }];
}

/** Return all pictures of `turns`, in the order in which a model sees them. */
export function allPictures(turns) {
  return turns.flatMap((turn) => turn.pictures);
}

/** Return the operations of a forward pass over prompt, pictures and answer, without a cache. */
export function countFlops(flops, usage) {
  const answerTokens = usage.completion_tokens;
  const positions = usage.prompt_tokens + Math.max(0, answerTokens - 1);
  return (
    flops.position * positions +
    (flops.attended_pair * positions * (positions + 1)) / 2 +
    flops.answer_token * answerTokens +
    flops.view * (usage.prompt_tokens_details?.views ?? 0)
  );
}

/** Return a number of operations in words, such as "1.23 GFLOPs". */
export function formatFlops(count) {
  const units = ["", "k", "M", "G", "T", "P"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(count || 1) / 3)));
  return `${(count / 1000 ** power).toPrecision(3)} ${units[power]}FLOPs`;
}

/** Return seconds with as many digits as matter. */
export function formatSeconds(seconds) {
  return seconds < 10 ? seconds.toFixed(2) : seconds.toFixed(1);
}

/** Return the items in random order. */
export function shuffle(items) {
  const shuffled = [...items];
  for (let last = shuffled.length - 1; last > 0; last--) {
    const other = Math.floor(Math.random() * (last + 1));
    [shuffled[last], shuffled[other]] = [shuffled[other], shuffled[last]];
  }
  return shuffled;
}
