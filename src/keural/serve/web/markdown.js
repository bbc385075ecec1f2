// Markdown as elements, while it is being written.
//
// In: a text in pieces. Out: elements. No string becomes markup: marked cuts the text into tokens, and each token becomes an element
// or text here, so that there is nothing to sanitise. HTML in an answer is shown as it is written; images are shown as links, since
// loading one would tell somebody that it was read; links go to web and mail addresses alone.
//
// What is settled is not looked at again: only the last block is parsed, at most once a frame. A block that is too long to be
// parsed again and again (LONGEST) is shown as plain text from there to its end.

import { Marked } from "./vendor/marked-18.2.1.js";
import { highlighted } from "./code.js";
import { element } from "./dom.js";
import { say } from "./words.js";

const LONGEST = 12_000;
const DEEPEST = 24;
const CHUNK = 8_000; // characters of plain text in one element
const SLICE = 8; // milliseconds of work in a frame
const PROTOCOLS = ["http:", "https:", "mailto:"];
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };

const marked = new Marked({ gfm: true, breaks: true });
marked.use({
  extensions: [
    {
      // A particle follows a word without a blank (**"예"**는), where CommonMark sees no end of the emphasis after a sign.
      name: "strong",
      level: "inline",
      start: (text) => text.indexOf("**"),
      tokenizer(text) {
        const found = /^\*\*(?=[^\s*])([^*\n]*[^\s*])\*\*(?=[\uac00-\ud7a3])/.exec(text);
        return found ? { type: "strong", raw: found[0], text: found[1], tokens: this.lexer.inlineTokens(found[1]) } : undefined;
      },
    },
  ],
});

/** Tokens of a text; as one plain token where marked gives up (thousands of quotes in each other). */
function lex(text) {
  try {
    return marked.lexer(text);
  } catch {
    return [{ type: "plain", raw: text }];
  }
}

function decoded(text) {
  return text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|([a-z]{2,4}));/gi, (whole, decimal, hex, name) => {
    const code = decimal ? Number(decimal) : hex ? parseInt(hex, 16) : null;
    if (code === null) return ENTITIES[name] ?? whole;
    return code > 0 && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? String.fromCodePoint(code) : whole;
  });
}

function address(href) {
  try {
    const found = new URL(href); // what is relative is none: it would be an address of this server
    return PROTOCOLS.includes(found.protocol) ? found.href : null;
  } catch {
    return null;
  }
}

function link(href, children, raw) {
  const target = address(href);
  if (target === null) return document.createTextNode(raw);
  return element("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow", title: target }, ...children);
}

const INLINE = {
  text: (token, depth) => (token.tokens ? inline(token.tokens, depth) : [decoded(token.text)]),
  escape: (token) => [token.text],
  strong: (token, depth) => [element("strong", {}, ...inline(token.tokens, depth))],
  em: (token, depth) => [element("em", {}, ...inline(token.tokens, depth))],
  del: (token, depth) => [element("del", {}, ...inline(token.tokens, depth))],
  codespan: (token) => [element("code", {}, token.text)],
  br: () => [element("br")],
  link: (token, depth) => [link(token.href, inline(token.tokens, depth), token.raw)],
  image: (token) => [link(token.href, [`${say("image")}: ${token.text || token.href}`], token.raw)],
  checkbox: (token) => [element("input", { type: "checkbox", disabled: true, checked: token.checked, "aria-label": token.checked ? "[x]" : "[ ]" })],
};

function inline(tokens, depth) {
  return tokens.flatMap((token) => (depth < DEEPEST && INLINE[token.type] ? INLINE[token.type](token, depth + 1) : [token.raw]));
}

const BLOCKS = {
  space: () => null,
  def: () => null,
  // One level for all: a page whose levels jump (an answer may begin with any) is hard to walk through by headings.
  heading: (token, depth) => element("h3", { class: `depth-${token.depth}` }, ...inline(token.tokens, depth)),
  paragraph: (token, depth) => element("p", {}, ...inline(token.tokens, depth)),
  text: (token, depth) => element("span", {}, ...inline(token.tokens ?? [token], depth)),
  checkbox: (token) => INLINE.checkbox(token)[0],
  hr: () => element("hr"),
  blockquote: (token, depth) => element("blockquote", { dir: "auto" }, ...blocks(token.tokens, depth + 1)),
  code: (token) => codeBlock(token.text, (token.lang ?? "").split(/\s/)[0]),
  list: (token, depth) => {
    const items = token.items.map((item) => element("li", { class: item.task ? "task" : null }, ...blocks(item.tokens, depth + 2)));
    return element(token.ordered ? "ol" : "ul", { dir: "auto", start: token.ordered && token.start !== 1 ? token.start : null }, ...items);
  },
  table: (token, depth) => {
    const cell = (name, found) => element(name, { class: found.align }, ...inline(found.tokens, depth));
    const head = element("tr", {}, ...token.header.map((found) => cell("th", found)));
    const rows = token.rows.map((row) => element("tr", {}, ...row.map((found) => cell("td", found))));
    const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
    return element("div", { class: "wide-content", dir: "auto", tabindex: "0", role: "group", "aria-label": say("table") }, table);
  },
};

function blocks(tokens, depth = 0) {
  return tokens.map((token) => (depth < DEEPEST && BLOCKS[token.type] ? BLOCKS[token.type](token, depth) : plainText(token.raw))).filter(Boolean);
}

function plainText(text) {
  return element("p", { class: "as-written" }, text.replace(/\n+$/, ""));
}

function codeBlock(text, language, ...remarks) {
  const name = element("span", {}, language.slice(0, 30) || say("code"), ...remarks);
  const copy = element("button", { type: "button", class: "quiet", "data-copy": true, "data-words": "copy" }, say("copy"));
  const code = element("code", {}, ...highlighted(text, language));
  const body = element("pre", { tabindex: "0", role: "group", "aria-label": say("code") }, code);
  return element("div", { class: "code" }, element("div", { class: "code-head" }, name, copy), body);
}

/** A text as it is written, in elements that the browser need not lay out until they are seen. */
export function plain(text) {
  const found = [];
  for (let place = 0; place < text.length; place += CHUNK) found.push(element("div", { class: "chunk" }, text.slice(place, place + CHUNK)));
  return found;
}

/** Where a block that is shown as plain text ends: after its closing fence, or at a blank line; -1 while it goes on. */
function endOfPlain(text, fence, from) {
  const end = fence ? new RegExp(`\\n {0,3}${fence}[ \\t]*(?:\\n|$)`, "g") : /\n[ \t]*\n/g;
  end.lastIndex = from;
  return end.exec(text) ? end.lastIndex : -1;
}

/** Whether nothing that follows can change what stands before this token. */
function settles(token) {
  return token.type === "space" || /\n[ \t]*\n$/.test(token.raw) || (token.type === "code" && /\n {0,3}(```+|~~~+)[ \t]*\n$/.test(token.raw));
}

/** An answer in an element, piece by piece. */
export class Writing {
  #root;
  #live = element("div", { class: "live" });
  #text = ""; // what came and is not settled
  #rest = []; // what came and was not looked at
  #plain = null; // the element, the fence and the last characters of a block that is shown as plain text
  #ended = false;
  #frame = 0;
  #notBefore = 0;
  #finished;

  constructor(root) {
    this.#root = root;
    root.replaceChildren(this.#live);
    this.finished = new Promise((resolve) => (this.#finished = resolve));
  }

  /** Add a piece. */
  push(piece) {
    this.#rest.push(piece);
    this.#later();
  }

  /** Nothing more comes; `finished` resolves when all of it is shown. */
  end() {
    this.#ended = true;
    this.#draw(true);
  }

  #later() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      if (performance.now() < this.#notBefore && !this.#ended) this.#later();
      else this.#draw();
    });
  }

  #draw(atOnce = false) {
    if (atOnce) cancelAnimationFrame(this.#frame);
    if (atOnce) this.#frame = 0;
    const begun = performance.now();
    let rest = this.#rest.join("").replace(/\r\n?/g, "\n");
    this.#rest = [];
    do {
      const room = this.#plain ? rest.length : LONGEST + 1 - this.#text.length;
      this.#text += rest.slice(0, room);
      rest = rest.slice(room);
      rest = (this.#plain ? this.#drawPlain() : this.#drawParsed()) + rest;
    } while (rest && performance.now() - begun < SLICE);
    this.#notBefore = performance.now() + 3 * (performance.now() - begun);
    if (rest) {
      this.#rest.unshift(rest);
      if (document.hidden) setTimeout(() => this.#draw());
      else this.#later();
    } else if (this.#ended) {
      this.#settle(this.#live.childNodes);
      this.#live.remove();
      this.#finished();
    }
  }

  /** Parse what is not settled; what follows a block that turned out too long is returned. */
  #drawParsed() {
    const tokens = lex(this.#text);
    let last = tokens.length - 1;
    while (last > 0 && tokens[last].type === "space") last -= 1;
    let open = last;
    while (open > 0 && !settles(tokens[open - 1])) open -= 1;
    if (open > 0) {
      this.#settle(blocks(tokens.slice(0, open)));
      this.#text = tokens.slice(open).map((token) => token.raw).join("");
    }
    if (this.#text.length > LONGEST) {
      const fence = /^ {0,3}(```+|~~~+)/.exec(this.#text)?.[1] ?? "";
      const body = element("div", { class: fence ? "" : "as-written" });
      this.#plain = { body, fence, before: "" };
      const first = fence ? this.#text.indexOf("\n") + 1 : 0;
      if (fence) {
        const block = codeBlock("", this.#text.slice(0, first).replace(/^[ `~]+/, "").trim(), ` · ${say("plain")}`);
        block.querySelector("code").replaceChildren(body);
        this.#settle([block]);
      } else this.#settle([body]);
      this.#text = this.#text.slice(first);
      this.#live.replaceChildren();
      return this.#drawPlain();
    }
    this.#live.replaceChildren(...blocks(tokens.slice(open)));
    return "";
  }

  /** Append to a block of plain text; what follows the block is returned. */
  #drawPlain() {
    const { body, fence, before } = this.#plain;
    const seen = before + this.#text;
    const end = endOfPlain(seen, fence, 0);
    const shown = end < 0 ? this.#text : this.#text.slice(0, Math.max(0, end - before.length));
    const rest = end < 0 ? "" : this.#text.slice(shown.length);
    this.#text = "";
    const own = fence && end >= 0 ? shown.replace(/\n? {0,3}(```+|~~~+)[ \t]*\n?$/, "") : shown;
    const lastChunk = body.lastElementChild;
    const room = lastChunk ? CHUNK - lastChunk.firstChild.length : 0;
    if (room > 0) lastChunk.firstChild.appendData(own.slice(0, room));
    body.append(...plain(own.slice(Math.max(0, room))));
    this.#plain.before = seen.slice(-8);
    if (end >= 0) this.#plain = null;
    return rest;
  }

  #settle(nodes) {
    for (const node of [...nodes]) this.#root.insertBefore(node, this.#live);
  }
}
