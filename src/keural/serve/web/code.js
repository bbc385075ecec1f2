// Colours of code.
//
// In: code and the name of its language. Out: nodes; highlight.js finds the words, and they become elements here, never markup.

import hljs from "./vendor/highlight-11.12.0.js";
import bash from "./vendor/highlight-11.12.0-bash.js";
import javascript from "./vendor/highlight-11.12.0-javascript.js";
import json from "./vendor/highlight-11.12.0-json.js";
import python from "./vendor/highlight-11.12.0-python.js";
import { element } from "./dom.js";

const LONGEST = 4_000;
for (const [name, grammar] of Object.entries({ bash, javascript, json, python })) hljs.registerLanguage(name, grammar);

/** Nodes of a code block; one text where the language is not known here or the code is long. */
export function highlighted(text, language) {
  if (!language || text.length > LONGEST || !hljs.getLanguage(language)) return [text];
  return nodes(hljs.highlight(text, { language, ignoreIllegals: true })._emitter.rootNode.children);
}

function nodes(children) {
  return children.map((child) => {
    if (typeof child === "string") return child;
    return child.scope ? element("span", { class: `hl-${child.scope.split(".")[0]}` }, ...nodes(child.children)) : element("span", {}, ...nodes(child.children));
  });
}
