// A conversation with all its versions: a tree of turns, one path of which is shown.
//
// In: what people and the model say. Out: plain objects that can be stored as they are, and that are checked when they come from a file.

export const FORMAT = "keural-conversations";
export const ROOT = "root";
const ROLES = ["user", "assistant"];
const SETTINGS = ["temperature", "top_p", "repetition_penalty", "max_tokens", "seed"];
const NOTES = ["stopped", "length", "broken"];
const COUNTS = ["tokens", "seconds", "first", "prompt", "cached"];

/** A name that no other conversation or turn has; `crypto.randomUUID` is there on TLS and this machine only. */
export function freshId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A conversation without turns. */
export function freshConversation(system = "", settings = {}) {
  const now = Date.now();
  return { id: freshId(), title: "", created: now, updated: now, system, settings: { ...settings }, turns: {}, shown: {} };
}

/** Add a turn after `parent` (a turn's id, or ROOT) and show it. */
export function addTurn(conversation, parent, role, content) {
  const turn = { id: freshId(), parent, role, content };
  conversation.turns[turn.id] = turn;
  conversation.shown[parent] = turn.id;
  if (!conversation.title && role === "user") conversation.title = content.trim().replace(/\s+/g, " ").slice(0, 80);
  return turn;
}

/** Versions of a turn, itself among them, in the order in which they were written. */
export function versions(conversation, turn) {
  return Object.values(conversation.turns).filter((other) => other.parent === turn.parent);
}

/** The turns that are shown, from the first to `last` (an id) or the end. */
export function path(conversation, last = null) {
  const found = [];
  for (let id = conversation.shown[ROOT]; id && conversation.turns[id]; id = conversation.shown[id]) {
    found.push(conversation.turns[id]);
    if (id === last) break;
  }
  return found;
}

/** The messages that an answer after `last` (an id) follows. */
export function messagesTo(conversation, last) {
  const turns = path(conversation, last).map(({ role, content }) => ({ role, content }));
  return conversation.system.trim() ? [{ role: "system", content: conversation.system }, ...turns] : turns;
}

/** Take into a conversation what another tab has kept of it meanwhile; whether that was anything. Nobody's turns are lost so: of a turn
 * that both have the longer one counts, and an empty one is no turn yet, or none any more. */
export function join(conversation, kept) {
  let joined = false;
  for (const [id, other] of Object.entries(kept.turns)) {
    const own = conversation.turns[id];
    if (!other.content || (own && own.content.length >= other.content.length)) continue;
    conversation.turns[id] = other;
    joined = true;
  }
  for (const [parent, child] of Object.entries(kept.shown)) if (child in conversation.turns) conversation.shown[parent] ??= child;
  if (joined) conversation.updated = Math.max(conversation.updated, kept.updated);
  return joined;
}

/** All conversations as a file holds them. */
export function toFile(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** Conversations of a file, with names of their own. Raises an `Error` in one line for what is none; nothing but known fields is taken. */
export function fromFile(text) {
  const file = JSON.parse(text);
  if (file?.format !== FORMAT) throw new Error(`"format" is not "${FORMAT}"`);
  if (file.version !== 1) throw new Error(`"version" is ${JSON.stringify(file.version)}, not 1`);
  if (!Array.isArray(file.conversations)) throw new Error(`"conversations" is not a list`);
  return file.conversations.map(checked);
}

function checked(given, place) {
  const where = `conversations[${place}]`;
  const need = (right, what) => {
    if (!right) throw new Error(`${where}${what}`);
  };
  need(isObject(given), " is not an object");
  for (const name of ["title", "system"]) need(typeof given[name] === "string", `.${name} is not a text`);
  for (const name of ["created", "updated"]) need(Number.isFinite(given[name]), `.${name} is not a number`);
  for (const name of ["settings", "turns", "shown"]) need(isObject(given[name]), `.${name} is not an object`);
  const conversation = freshConversation(given.system, numbers(given.settings, SETTINGS));
  Object.assign(conversation, { title: given.title.slice(0, 200), created: given.created, updated: given.updated });
  const names = new Map([[ROOT, ROOT]]);
  for (const id of Object.keys(given.turns)) names.set(id, freshId());
  for (const [id, turn] of Object.entries(given.turns)) {
    const at = `.turns[${JSON.stringify(id).slice(0, 40)}]`;
    need(isObject(turn) && id !== ROOT, `${at} is not a turn`);
    need(ROLES.includes(turn.role), `${at}.role is not user or assistant`);
    need(typeof turn.content === "string", `${at}.content is not a text`);
    need(names.has(turn.parent) && turn.parent !== id, `${at}.parent names no turn`);
    conversation.turns[names.get(id)] = {
      id: names.get(id), parent: names.get(turn.parent), role: turn.role, content: turn.content,
      ...(NOTES.includes(turn.note) ? { note: turn.note } : {}), ...(isObject(turn.counts) ? { counts: numbers(turn.counts, COUNTS) } : {}),
    };
  }
  for (const [parent, child] of Object.entries(given.shown)) {
    const right = names.has(parent) && names.has(child) && given.turns[child]?.parent === parent;
    need(right, `.shown[${JSON.stringify(parent).slice(0, 40)}] names no turn that follows`);
    conversation.shown[names.get(parent)] = names.get(child);
  }
  return conversation;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function numbers(given, names) {
  return Object.fromEntries(names.filter((name) => Number.isFinite(given[name])).map((name) => [name, given[name]]));
}
