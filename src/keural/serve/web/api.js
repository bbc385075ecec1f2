// The server's API: the model's name, and answers as they come.
//
// In: messages and settings. Out: events of a stream, or a `ServerError` that says what the server said. The API key lies in
// sessionStorage until the tab is closed, and is asked for when the server wants one.

const KEY = "keural.key";
let keyInMemory = null;

/** What the server refused, with its word for programs. */
export class ServerError extends Error {
  constructor(status, code, message, retryAfter = null) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

function key() {
  try {
    return sessionStorage.getItem(KEY) ?? keyInMemory;
  } catch {
    return keyInMemory;
  }
}

/** Send this key from now on. */
export function useKey(value) {
  keyInMemory = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // it is kept until the page is loaded again
  }
}

function headers(more = {}) {
  const held = key();
  return held ? { ...more, Authorization: `Bearer ${held}` } : more;
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers), credentials: "omit", redirect: "error", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && /header/i.test(error.message)) throw new ServerError(401, "invalid_api_key", error.message);
    throw new ServerError(0, "offline", error.message);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const said = body?.error ?? {};
  throw new ServerError(response.status, said.code ?? null, said.message ?? response.statusText, response.headers.get("Retry-After"));
}

/** The model that is served. */
export async function servedModel() {
  return (await (await send("/v1/models", {})).json()).data[0];
}

/** Data of server-sent events, and `{queue}` where a comment says the place in the queue; each byte is looked at once. */
export async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = value.split("\n");
      for (let place = 0; place < lines.length; place++) {
        held.push(lines[place]);
        if (place === lines.length - 1) break; // not ended yet
        const line = held.join("");
        held = [];
        if (line.startsWith("data:")) yield line.slice(5).trim();
        else if (/^: queue [0-9]+$/.test(line)) yield { queue: Number(line.slice(8)) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** An answer: `{queue}` while it waits, `{text}`, `{finish}` and `{usage}` as they come. Raises `ServerError`, or what `signal` aborts with. */
export async function* answer(messages, settings, signal) {
  const body = JSON.stringify({ messages, ...settings, stream: true, stream_options: { include_usage: true } });
  const response = await send("/v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json", "X-Queue-Position": "1" }, body, signal });
  let ended = false;
  try {
    for await (const data of eventsOf(response.body)) {
      if (typeof data === "object") {
        yield data;
        continue;
      }
      if (data === "[DONE]") {
        ended = true;
        return;
      }
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(response.status, event.error.code, event.error.message);
      const choice = event.choices?.[0];
      if (choice?.delta?.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) yield { finish: choice.finish_reason };
      if (event.usage) yield { usage: event.usage };
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError(0, "cut_off", error.message);
  }
  if (!ended) throw new ServerError(0, "cut_off", "");
}
