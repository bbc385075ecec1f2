// Conversations in the browser's own database.
//
// In: conversations. Out: the same, after the page was loaded again. Where a browser keeps nothing (private windows of some), they
// are held until the tab is closed, and `lasting` is false. Tabs share the database: what is saved is joined with what lies there.

import { join } from "./tree.js";

const DATABASE = "keural";
const WHOLE = "conversations";
const HEADS = "heads"; // title and time alone, so that the list needs no turns

let database = null;
const held = new Map();

/** Whether what is saved outlives the tab. */
export let lasting = true;

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Open the database. */
export async function open() {
  try {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore(WHOLE, { keyPath: "id" });
      request.result.createObjectStore(HEADS, { keyPath: "id" });
    };
    database = await promised(request);
    database.onversionchange = () => database.close();
  } catch {
    lasting = false;
  }
}

function transaction(mode, work) {
  return new Promise((resolve, reject) => {
    const current = database.transaction([WHOLE, HEADS], mode);
    current.oncomplete = resolve;
    current.onerror = current.onabort = () => reject(current.error);
    work(current.objectStore(WHOLE), current.objectStore(HEADS));
  });
}

function put(whole, heads, conversation) {
  const { id, title, updated } = conversation;
  whole.put(conversation);
  heads.put({ id, title, updated });
}

/** Keep a conversation as it is now, with what other tabs have kept of it. Raises where the disk has no room. */
export async function save(conversation) {
  const { id } = conversation;
  if (!database) return void held.set(id, structuredClone(conversation));
  await transaction("readwrite", (whole, heads) => {
    const before = whole.get(id);
    before.onsuccess = () => {
      if (before.result) join(conversation, before.result);
      put(whole, heads, conversation);
    };
  });
}

/** Keep new conversations, all of them or none. Raises where the disk has no room. */
export async function saveAll(conversations) {
  if (!database) return conversations.forEach((one) => held.set(one.id, structuredClone(one)));
  await transaction("readwrite", (whole, heads) => {
    for (const conversation of conversations) put(whole, heads, conversation);
  });
}

/** Forget a conversation. */
export async function remove(id) {
  if (!database) return void held.delete(id);
  await transaction("readwrite", (whole, heads) => {
    whole.delete(id);
    heads.delete(id);
  });
}

/** Titles of all conversations, the newest first. */
export async function titles() {
  const found = database ? await promised(database.transaction(HEADS).objectStore(HEADS).getAll()) : [...held.values()];
  return found.sort((one, other) => other.updated - one.updated);
}

/** A conversation by its id; undefined where there is none. */
export async function load(id) {
  return database ? promised(database.transaction(WHOLE).objectStore(WHOLE).get(id)) : structuredClone(held.get(id));
}

/** All conversations. */
export async function everything() {
  return database ? promised(database.transaction(WHOLE).objectStore(WHOLE).getAll()) : [...held.values()];
}
