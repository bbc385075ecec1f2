// Elements without markup: nothing in this page ever turns a string into HTML.
//
// In: names, attributes, children. Out: elements.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  plus: "M12 5v14M5 12h14", cross: "M6 6l12 12M18 6L6 18", menu: "M4 7h16M4 12h16M4 17h16", up: "M12 19V6M6 11l6-6 6 6",
  square: "M8 8h8v8H8z", sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M15 6v4M9 14v4", copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 12l5 5 9-10", pencil: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3", again: "M20 12a8 8 0 1 1-2.5-5.8M20 4v4h-4",
  left: "M14 6l-6 6 6 6", right: "M10 6l6 6-6 6", bin: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
};

/** An element; `attributes` are set as text, functions as listeners of events. */
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** A drawing by its name, which readers of the screen pass over. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  drawing.setAttribute("viewBox", "0 0 24 24");
  drawing.setAttribute("aria-hidden", "true");
  drawing.append(path);
  return drawing;
}

/** A button that is a drawing with words for who does not see it. */
export function iconButton(name, words, press) {
  return element("button", { type: "button", class: "icon", "data-label": words, click: press }, icon(name));
}

/** Put a text into the clipboard; false where the browser does not allow it. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // without TLS a browser has no clipboard for pages of other machines
    const held = element("textarea", { class: "unseen", "aria-hidden": "true", tabindex: "-1" });
    held.value = text;
    document.body.append(held);
    held.select();
    const done = document.execCommand("copy");
    held.remove();
    return done;
  }
}
