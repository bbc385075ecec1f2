// A turn of a conversation as people see it.
//
// In: a turn. Out: an element with its text, its buttons (`data-do` names what they do) and a line of figures.

import { element, icon, iconButton } from "./dom.js";
import { Writing, plain } from "./markdown.js";
import { fill, known, number, say } from "./words.js";
import { versions } from "./tree.js";

/** The element of a turn. `writing` is there while the model writes it: it takes pieces. */
export function turnElement(conversation, turn, writes = false) {
  const body = element("div", { class: "body" });
  const tools = element("div", { class: "tools" });
  const article = element(
    "article",
    { class: `turn ${turn.role}`, "data-id": turn.id },
    element("h2", { class: "unseen", "data-words": turn.role === "user" ? "you" : "answer" }),
    body,
    element("div", { class: "foot" }, tools, element("p", { class: "figures" })),
  );
  let writing = null;
  if (turn.role === "user") body.append(...plain(turn.content));
  else {
    writing = new Writing(body);
    if (turn.content) writing.push(turn.content);
    if (!writes) writing.end();
  }
  if (writes) wait(article);
  else finish(article, conversation, turn);
  fill(article);
  return { article, writing };
}

/** Show that nothing has come yet. */
function wait(article) {
  article.classList.add("writing");
  article.setAttribute("aria-busy", "true");
  article.querySelector(".figures").append(element("span", { class: "dots", "aria-hidden": "true" }), element("span", { class: "count" }));
}

/** Show what can be done with a turn that has ended. */
export function finish(article, conversation, turn) {
  article.classList.remove("writing");
  article.removeAttribute("aria-busy");
  const tools = [action("copy", "copy")];
  if (turn.role === "user") tools.push(action("pencil", "edit"));
  else tools.push(action("again", "again"));
  article.querySelector(".tools").replaceChildren(...versionTools(conversation, turn), ...tools);
  if (turn.role === "assistant") {
    if (!turn.content && !turn.note) article.querySelector(".body").append(element("p", { class: "small", "data-words": "empty_answer" }));
    article.querySelector(".figures").textContent = figures(turn);
  }
  fill(article);
}

function action(drawing, name) {
  const button = iconButton(drawing, name);
  button.dataset.do = name;
  return button;
}

function versionTools(conversation, turn) {
  const all = versions(conversation, turn);
  if (all.length < 2) return [];
  const place = all.indexOf(turn);
  const before = action("left", "before");
  const after = action("right", "after");
  before.disabled = place === 0;
  after.disabled = place === all.length - 1;
  const words = say("version", place + 1, all.length);
  return [before, element("span", { class: "place", role: "img", "aria-label": words, title: words }, `${place + 1} / ${all.length}`), after];
}

/** Tokens, tokens a second, and when the first came, in seconds from the question on. What came at once was made before, so the
 * wait belongs to its time. */
export function speedLine(tokens, seconds, first) {
  const span = seconds - first;
  const speed = span > 0.2 ? (tokens - 1) / span : tokens / Math.max(seconds, 0.001);
  return say("stats", number(tokens), number(speed, speed < 10 ? 1 : 0), number(first, first < 10 ? 2 : 0));
}

/** Tokens, speed and how the answer ended, in one line. */
export function figures(turn) {
  const { tokens, seconds, first, prompt, cached } = turn.counts ?? {};
  const parts = [];
  if (tokens) {
    parts.push(speedLine(tokens, seconds, first));
  }
  if (prompt) parts.push(say("prompt", number(prompt), number(cached ?? 0)));
  if (turn.note) parts.push(say(turn.note));
  return parts.join(" · ");
}

/** What is shown in an answer's place when there is none, with a button to ask again. */
export function failure(error) {
  const words = error ? explained(error) : null;
  const again = element("button", { type: "button", class: "quiet", "data-do": "retry" }, icon("again"), element("span", { "data-words": "again" }));
  const said = words ? [element("p", {}, words)] : [];
  const details = error?.message && error.code !== "offline" ? [element("p", { class: "small" }, error.message)] : [];
  const article = element("article", { class: "turn failure", role: words ? "alert" : null }, ...said, ...details, again);
  fill(article);
  return article;
}

/** An error in the reader's language. */
export function explained(error) {
  if (!known(error.code)) return say("failed");
  return say(error.code, error.retryAfter ?? "1");
}
