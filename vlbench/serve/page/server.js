// What the page asks the server, and its failures in words.

let apiKey = ""; // in memory alone: it is gone when the page is left
let askForKey = async () => false; // set by `onKeyNeeded`
let keyDialog = null; // the one that is open: several requests wait for the same key

/** A failure in words: a key of the texts, and its values. */
export class ServerError extends Error {
  constructor(key, values = {}) {
    super(key);
    this.key = key;
    this.values = values;
  }
}

/** Call `ask(isRefused)` when the server wants a key; it returns the key, or "" for none. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

async function obtainKey() {
  const refused = apiKey;
  keyDialog ??= askForKey(refused !== "").finally(() => (keyDialog = null));
  apiKey = (await keyDialog) || apiKey;
  return apiKey !== refused;
}

async function request(path, body, signal) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  const used = apiKey;
  if (used) headers.Authorization = `Bearer ${used}`;
  const method = body === undefined ? "GET" : "POST";
  const options = { method, headers, signal, body: body && JSON.stringify(body) };
  const response = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new ServerError("errorAway");
  });
  if (response.status === 401 && (used !== apiKey || (await obtainKey()))) {
    return request(path, body, signal);
  }
  if (!response.ok) throw await explainFailure(response);
  return response;
}

async function explainFailure(response) {
  const answer = await response.json().catch(() => null);
  if (response.status === 401) return new ServerError("errorKey");
  if (response.status === 413) return new ServerError("errorLarge");
  if (response.status === 429) {
    const seconds = Math.ceil(Number(response.headers.get("Retry-After")));
    return seconds > 0 ? new ServerError("errorBusy", { seconds }) : new ServerError("errorBusySoon");
  }
  return describeError(answer, response.status);
}

function describeError(answer, status) {
  const detail = answer?.error?.message ?? answer?.detail;
  const message = Array.isArray(detail) ? detail[0]?.msg : detail;
  if (typeof message === "string" && message) return new ServerError("errorSays", { message });
  return new ServerError("errorStatus", { status });
}

/** Return the served models and what the page has to know of them. */
export async function getConfig() {
  const [config, listed] = await Promise.all([request("page/config"), request("v1/models")]);
  const [{ models, votes }, { data }] = await Promise.all([config.json(), listed.json()]);
  return { votes, models: data.map((entry) => ({ ...entry, ...models[entry.id] })) };
}

/** Write a vote down. */
export async function sendVote(vote) {
  await request("page/votes", vote);
}

/** Return the heat map of an answer: `rows` of patches, or null, and the `box` that they cover. */
export async function getHeatMap(question) {
  return (await request("page/heat_map", question)).json();
}

/** Yield the pieces of an answer: {text}, and at the end {usage} and {finish}. */
export async function* streamAnswer(question, signal) {
  const body = { ...question, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", body, signal);
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw describeError(chunk, 500);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (chunk.usage) yield { usage: chunk.usage };
  }
  throw new ServerError("errorLost");
}

async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError("errorLost");
  } finally {
    reader.cancel().catch(() => {}); // it may be broken already
  }
}
