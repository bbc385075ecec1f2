// The field that messages are written in, and what Enter does in it.
//
// In: keys and compositions. Out: one call of `send` for each message. Hangul is composed: when Enter comes, the last syllable is
// still on its way. Some browsers report that Enter during the composition, some after its end, some both times, and some put a new
// line into the field. All of it must come to the same: the message is sent once, with its last syllable and without a new line.

const HANGUL = /[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff]/;
const KEY_OF_A_COMPOSITION = 229;

/** Make Enter send what is in `field`; Shift+Enter starts a line, and on touch screens Enter does. */
export function sendOnEnter(field, send) {
  let composing = false;
  let composed = ""; // what the composition has so far
  let waiting = false; // Enter came while the last syllable was on its way
  let shift = false;
  const touch = matchMedia("(hover: none) and (pointer: coarse)");

  const isEnter = (event) => event.key === "Enter" || event.code === "Enter" || event.code === "NumpadEnter";

  field.addEventListener("compositionstart", () => {
    composing = true;
    composed = "";
  });
  field.addEventListener("compositionupdate", (event) => {
    composed = event.data;
  });
  field.addEventListener("compositionend", () => {
    composing = false;
    if (!waiting) return;
    setTimeout(() => { // the field has the syllable only after this event, in some browsers
      if (!waiting) return;
      waiting = false;
      send();
    });
  });
  field.addEventListener("keydown", (event) => {
    shift = event.shiftKey;
    if (!isEnter(event)) waiting = false; // it went on after all
    if (!isEnter(event) || event.shiftKey || touch.matches) return;
    if (composing || event.isComposing) {
      // Enter ends a Hangul syllable and means "send"; in other scripts it chooses among candidates and means no more than that.
      if (HANGUL.test(composed)) {
        waiting = true;
        event.preventDefault();
      }
      return;
    }
    event.preventDefault();
    if (event.repeat) return;
    if (event.keyCode === KEY_OF_A_COMPOSITION && !HANGUL.test(composed)) return; // Safari: the Enter that chose a candidate
    waiting = false;
    send();
  });
  field.addEventListener("beforeinput", (event) => {
    const line = event.inputType === "insertLineBreak" || event.inputType === "insertParagraph";
    if (line && !shift && !touch.matches) event.preventDefault();
  });
}
