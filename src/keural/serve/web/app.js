// The page: a conversation, its list, and what the buttons do.
//
// In: what people type. Out: answers of this server's model. Everything is kept in the browser.

import { ServerError, answer, servedModel, useKey } from "./api.js";
import { sendOnEnter } from "./composer.js";
import { copyText, element, icon, iconButton } from "./dom.js";
import * as store from "./store.js";
import { ROOT, addTurn, freshConversation, fromFile, join, messagesTo, path, toFile, versions } from "./tree.js";
import { explained, failure, figures, finish, speedLine, turnElement } from "./turns.js";
import { fill, number, say, switchLanguage } from "./words.js";

const AT_ONCE = 4; // turns that are drawn before the page is shown; older ones follow in pauses
const SLICE = 6; // milliseconds
const SAVE_EVERY = 1500;
const NEAR = 60; // pixels from the end within which the page follows an answer
const PARAMETERS = { temperature: [0, 100, "any"], top_p: [0, 1, "any"], repetition_penalty: [0.01, 100, "any"], max_tokens: [1, 1e6, 1], seed: [0, 2 ** 53 - 1, 1] };

const at = (id) => document.getElementById(id);
const [scroll, turns, field] = [at("scroll"), at("turns"), at("prompt")];
let talk = freshConversation();
let running = null; // the answer that is being written: its conversation, turn, element and controller
let latest = null; // the same, or the one that was written last
let following = true; // whether the end of the page is kept in view
let drawing = 0; // counts drawings of conversations, so that an old one can see that it is old

// ---- the conversation

function draw() {
  const mine = ++drawing;
  if (running?.talk.id === talk.id) talk = running.talk;
  const all = path(talk);
  const elements = (from, to) => all.slice(from, to).map((turn) => (running?.turn === turn ? running.article : turnElement(talk, turn).article));
  let older = Math.max(0, all.length - AT_ONCE);
  turns.replaceChildren(...elements(older));
  if (all.at(-1)?.role === "user" && !(running?.talk === talk)) turns.append(failure(null));
  at("empty").hidden = all.length > 0;
  showTitle();
  following = true;
  requestAnimationFrame(toTheEnd); // to ask for heights now would lay the page out within this task
  const more = (deadline) => {
    if (mine !== drawing || older === 0) return;
    const begun = performance.now();
    while (older > 0 && performance.now() - begun < SLICE) {
      older -= 1;
      turns.prepend(...elements(older, older + 1));
    }
    pause(more);
  };
  pause(more);
}

function showTitle() {
  at("title").textContent = talk.title || say("untitled");
  document.title = talk.title ? `${talk.title} · keural` : "keural";
}

function pause(work) {
  if (window.requestIdleCallback) requestIdleCallback(work, { timeout: 200 });
  else setTimeout(work, 20);
}

function toTheEnd() {
  if (following) scroll.scrollTop = scroll.scrollHeight;
}

/** What the browser's database gives; undefined, and a notice, where it does not work. */
async function kept(work) {
  try {
    return await work();
  } catch (error) {
    notice(`${say("noStore")} (${error?.message ?? error})`);
  }
}

function keep(conversation) {
  return kept(() => store.save(conversation));
}

/** Show what another tab has kept since this one was looked at. */
async function catchUp() {
  await list();
  const found = await kept(() => store.load(talk.id));
  if (running?.talk.id === talk.id || turns.querySelector(".edit")) return; // begun, perhaps, while the database was asked
  if (found?.id === talk.id && join(talk, found)) draw();
}

/** Let the model answer the turn `parent` of `conversation`. */
async function run(conversation, parent) {
  if (running) return;
  notice("");
  const messages = messagesTo(conversation, parent);
  const turn = addTurn(conversation, parent, "assistant", "");
  turn.note = "stopped"; // it is, should the page be closed before the answer ends
  const { article, writing } = turnElement(conversation, turn, true);
  const mine = (running = { talk: conversation, turn, article, controller: new AbortController() });
  latest = mine;
  mine.over = new Promise((resolve) => (mine.resolve = resolve));
  for (const old of turns.querySelectorAll(".failure")) old.remove();
  turns.append(article);
  [at("empty").hidden, following] = [true, true];
  showRunning(true);
  toTheEnd();
  const begun = performance.now();
  const counts = { tokens: 0, seconds: 0, first: 0 };
  let place = 0; // in the queue
  const since = () => (performance.now() - begun) / 1000;
  const shown = article.querySelector(".count");
  const show = () => {
    shown.textContent = counts.tokens
      ? speedLine(counts.tokens, counts.seconds, counts.first)
      : `${place ? say("queued", number(place)) : say("waiting")} ${number(Math.floor(since()))} s`;
  };
  const clock = setInterval(show, 500);
  show();
  let trouble = null;
  let saved = begun;
  await keep(conversation);
  try {
    for await (const event of answer(messages, conversation.settings, mine.controller.signal)) {
      if (event.text) {
        counts.tokens += 1;
        counts.seconds = since();
        counts.first ||= counts.seconds;
        turn.content += event.text;
        writing.push(event.text);
        if (performance.now() - saved > SAVE_EVERY) {
          saved = performance.now();
          keep(conversation);
        }
      } else if (event.queue !== undefined) {
        place = event.queue;
        show();
      } else if (event.finish) {
        if (event.finish === "length") turn.note = "length";
        else delete turn.note;
      } else if (event.usage) {
        counts.seconds = since();
        counts.tokens = event.usage.completion_tokens;
        counts.prompt = event.usage.prompt_tokens;
        counts.cached = event.usage.prompt_tokens_details?.cached_tokens ?? 0;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      trouble = error;
      if (!(error instanceof ServerError)) console.error(error);
    }
  }
  clearInterval(clock);
  if (counts.tokens) turn.counts = counts;
  if (trouble) turn.note = "broken";
  running = null;
  await end(conversation, turn, article, writing, trouble);
  mine.resolve();
}

/** An answer has ended, or none has come. */
async function end(conversation, turn, article, writing, trouble) {
  const shown = article.isConnected;
  const others = versions(conversation, turn).filter((other) => other !== turn);
  if (trouble && !turn.content) {
    delete conversation.turns[turn.id];
    delete conversation.shown[turn.parent];
  }
  if (trouble && !turn.content && others.length) {
    conversation.shown[turn.parent] = others.at(-1).id;
    if (shown) draw(); // what was there before, with all that follows it
  } else if (trouble && !turn.content) article.replaceWith(failure(trouble));
  if (trouble && (turn.content || others.length)) notice([explained(trouble), trouble.message].filter(Boolean).join(" — "));
  conversation.updated = Date.now();
  showRunning(false);
  writing.end();
  await writing.finished;
  finish(article, conversation, turn);
  if (shown) toTheEnd();
  at("status").textContent = trouble ? explained(trouble) : `${say("answer")}: ${turn.content.slice(0, 1000)}`;
  await keep(conversation);
  await list();
  if (trouble?.status === 401) askForKey(() => conversation.id === talk.id && run(conversation, turn.parent));
}

function showRunning(on) {
  at("send").hidden = on;
  at("stop").hidden = !on;
  if (on) at("status").textContent = say("writing");
  sizeAndState();
}

function stop() {
  running?.controller.abort();
}

function send() {
  const text = field.value.trim();
  if (!text || running) return;
  field.value = "";
  const last = path(talk).at(-1);
  const turn = addTurn(talk, last?.id ?? ROOT, "user", text);
  talk.updated = Date.now();
  turns.append(turnElement(talk, turn).article);
  showTitle();
  history.replaceState(null, "", `#${talk.id}`);
  run(talk, turn.id).catch(console.error);
  list();
}

// ---- what the buttons of a turn do

function turnOf(node) {
  const article = node.closest("article");
  return { article, turn: talk.turns[article.dataset.id] };
}

async function copied(button, text) {
  if (!(await copyText(text))) return notice(say("copyFailed"));
  at("status").textContent = say("copied");
  if (button.classList.contains("copied")) return; // pressed again while it says so
  const before = [...button.childNodes];
  button.classList.add("copied");
  button.replaceChildren(button.classList.contains("icon") ? icon("check") : say("copied"));
  setTimeout(() => {
    button.classList.remove("copied");
    button.replaceChildren(...before);
  }, 1200);
}

const ACTIONS = {
  copy: (button) => copied(button, turnOf(button).turn.content),
  again(button) {
    if (running) return;
    const { turn } = turnOf(button);
    const rest = path(talk).slice(path(talk).indexOf(turn));
    for (const { id } of rest) turns.querySelector(`[data-id="${id}"]`)?.remove();
    run(talk, turn.parent);
  },
  retry() {
    const last = path(talk).at(-1);
    if (last?.role === "user") run(talk, last.id);
    else if (last) run(talk, last.parent);
  },
  before: (button) => move(button, -1),
  after: (button) => move(button, 1),
  edit(button) {
    if (running) return;
    const { article, turn } = turnOf(button);
    edit(article, turn);
  },
};

function move(button, step) {
  if (running?.talk === talk) return;
  const { turn } = turnOf(button);
  const all = versions(talk, turn);
  const other = all[all.indexOf(turn) + step];
  if (!other) return;
  talk.shown[turn.parent] = other.id;
  draw();
  keep(talk);
  const article = turns.querySelector(`[data-id="${other.id}"]`);
  article?.scrollIntoView({ block: "nearest" });
  const name = step < 0 ? "before" : "after";
  const next = article?.querySelector(`[data-do="${name}"]`);
  (next?.disabled ? article.querySelector(`[data-do="${step < 0 ? "after" : "before"}"]`) : next)?.focus();
}

function edit(article, turn) {
  const input = element("textarea", { rows: "1", "data-label": "edit" });
  input.value = turn.content;
  const leave = () => {
    const { article: old } = turnElement(talk, turn);
    form.closest("article").replaceWith(old);
    old.querySelector('[data-do="edit"]').focus();
  };
  const save = () => {
    const text = input.value.trim();
    if (!text || running) return;
    const changed = addTurn(talk, turn.parent, "user", text);
    draw();
    run(talk, changed.id);
    field.focus();
  };
  const form = element(
    "form",
    { class: "edit", submit: (event) => (event.preventDefault(), save()) },
    input,
    element(
      "div",
      { class: "actions" },
      element("button", { type: "button", class: "quiet", "data-words": "cancel", click: leave }),
      element("button", { type: "submit", class: "main", "data-words": "save" }),
    ),
  );
  sendOnEnter(input, save);
  input.addEventListener("keydown", (event) => event.key === "Escape" && !event.isComposing && leave());
  input.addEventListener("input", () => grow(input));
  article.querySelector(".foot").hidden = true;
  article.querySelector(".body").replaceChildren(form);
  article.classList.add("editing");
  fill(form);
  grow(input);
  input.focus();
}

// ---- the list of conversations

async function list() {
  const found = await kept(() => store.titles());
  if (!found) return;
  const items = found.map(({ id, title }) => {
    const words = title || say("untitled");
    const open = element("button", { type: "button", class: "open", "aria-current": id === talk.id ? "true" : null, click: () => show(id) }, words);
    const bin = iconButton("bin", "remove", () => removeTalk(id, words));
    return element("li", {}, open, bin);
  });
  at("list").replaceChildren(...items);
  fill(at("list"));
}

async function show(id) {
  const found = running?.talk.id === id ? running.talk : await kept(() => store.load(id));
  if (!found) return;
  talk = found;
  history.replaceState(null, "", `#${id}`);
  draw();
  side(false);
  await list();
}

function fresh() {
  talk = freshConversation(talk.system, talk.settings);
  history.replaceState(null, "", location.pathname);
  draw();
  side(false);
  list();
  field.focus();
}

async function removeTalk(id, words) {
  if (!confirm(say("removeAsk", words))) return;
  if (latest?.talk.id === id) {
    latest.controller.abort();
    await latest.over; // it is saved once more at its end
  }
  await kept(() => store.remove(id));
  if (talk.id === id) fresh();
  else await list();
}

async function exportAll() {
  const all = await kept(() => store.everything());
  if (!all) return;
  const name = `keural-${new Date().toISOString().slice(0, 10)}.json`;
  const file = URL.createObjectURL(new Blob([toFile(all)], { type: "application/json" }));
  element("a", { href: file, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(file), 10_000);
}

async function importFile(file) {
  let found;
  try {
    found = fromFile(await file.text());
  } catch (error) {
    return notice(say("badFile", String(error.message).slice(0, 200)));
  }
  await kept(async () => {
    await store.saveAll(found);
    notice(say("imported", number(found.length)));
  });
  await list();
}

// ---- dialogs

function drawParameters() {
  const fields = Object.entries(PARAMETERS).map(([name, [low, high, step]]) => {
    const input = element("input", { type: "number", id: `parameter-${name}`, min: low, max: high, step, inputmode: "decimal" });
    return element("label", { class: "field" }, element("span", { "data-words": name }), input);
  });
  at("parameters").replaceChildren(...fields);
}

function openSettings() {
  at("system").value = talk.system;
  for (const name of Object.keys(PARAMETERS)) at(`parameter-${name}`).value = talk.settings[name] ?? "";
  at("settings").showModal();
}

async function saveSettings() {
  talk.system = at("system").value;
  talk.settings = {};
  for (const name of Object.keys(PARAMETERS)) {
    const value = at(`parameter-${name}`).valueAsNumber;
    if (Number.isFinite(value)) talk.settings[name] = value;
  }
  if (path(talk).length) await keep(talk);
}

let afterKey = null;

function askForKey(then) {
  afterKey = then;
  at("key-value").value = "";
  at("key").showModal();
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

// ---- the frame

function grow(input) {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function sizeAndState() {
  grow(field);
  at("send").disabled = !field.value.trim();
}

function side(open) {
  document.body.classList.toggle("with-side", open);
  at("veil").hidden = !open;
  at("open-side").setAttribute("aria-expanded", String(open));
  at("side").inert = !open && matchMedia("(max-width: 760px)").matches;
  if (open) at("close-side").focus();
}

async function nameModel() {
  try {
    const model = await servedModel();
    at("model").textContent = model.id;
    at("model").title = `${model.id} · ${number(model.max_model_len)}`;
    drawAsks(model.suggestions ?? []);
  } catch (error) {
    if (error.status === 401) askForKey(nameModel);
    else notice(explained(error));
  }
}

/** What the model suggests to ask: a click asks it. */
function drawAsks(texts) {
  const buttons = texts.map((text) => {
    const ask = () => {
      field.value = text;
      send();
      sizeAndState();
    };
    return element("button", { type: "button", class: "ask", dir: "auto", click: ask }, text);
  });
  at("asks").replaceChildren(...buttons);
  at("asks").hidden = buttons.length === 0;
}

function inWords() {
  fill(document);
  showTitle();
  for (const { id } of Object.values(talk.turns)) {
    const shown = turns.querySelector(`[data-id="${id}"] .figures`);
    if (shown && running?.turn.id !== id) shown.textContent = figures(talk.turns[id]);
  }
}

function listen() {
  sendOnEnter(field, send);
  field.addEventListener("input", sizeAndState);
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
    sizeAndState();
  });
  at("stop").addEventListener("click", stop);
  turns.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.dataset.do) ACTIONS[button.dataset.do](button);
    else if (button && "copy" in button.dataset) copied(button, button.closest(".code").querySelector("pre").textContent);
  });
  scroll.addEventListener("scroll", () => (following = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR), { passive: true });
  scroll.addEventListener("wheel", (event) => event.deltaY < 0 && (following = false), { passive: true });
  new ResizeObserver(toTheEnd).observe(turns);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
    if (document.body.classList.contains("with-side")) {
      side(false);
      at("open-side").focus();
    } else stop();
  });
  document.addEventListener("visibilitychange", () => document.hidden && running && keep(running.talk));
  window.addEventListener("focus", catchUp);
  at("new").addEventListener("click", fresh);
  at("open-side").addEventListener("click", () => side(true));
  for (const id of ["close-side", "veil"]) at(id).addEventListener("click", () => side(false));
  matchMedia("(max-width: 760px)").addEventListener("change", () => side(false));
  at("export").addEventListener("click", exportAll);
  at("import").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", async () => {
    const [file] = at("file").files;
    at("file").value = "";
    if (file) await importFile(file);
  });
  at("language").addEventListener("click", () => {
    switchLanguage();
    inWords();
    list();
  });
  at("open-settings").addEventListener("click", openSettings);
  at("reset").addEventListener("click", () => {
    for (const input of at("settings").querySelectorAll("input, textarea")) input.value = "";
  });
  at("settings").addEventListener("close", () => at("settings").returnValue === "save" && saveSettings());
  at("key").addEventListener("close", () => {
    const value = at("key-value").value.trim();
    if (at("key").returnValue !== "save" || !value) return;
    useKey(value);
    if (afterKey !== nameModel) nameModel();
    afterKey?.();
  });
  for (const dialog of [at("settings"), at("key")]) {
    // Enter in a field means the main button, and a dialog that is closed with Escape saves nothing.
    dialog.addEventListener("cancel", () => (dialog.returnValue = ""));
    dialog.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.isComposing || event.target.tagName !== "INPUT") return;
      event.preventDefault();
      dialog.querySelector(".main").click();
    });
  }
}

async function begin() {
  for (const node of document.querySelectorAll("[data-icon]")) node.append(icon(node.dataset.icon));
  drawParameters();
  fill(document);
  listen();
  side(false);
  sizeAndState();
  nameModel();
  await store.open();
  if (!store.lasting) notice(say("noStore"));
  const asked = location.hash.slice(1);
  talk = (asked && (await kept(() => store.load(asked)))) || talk;
  draw();
  await list();
  document.body.dataset.ready = "true";
}

begin();
