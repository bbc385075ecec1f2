// What the page says, in Korean and English.
//
// In: a language of the browser, or the one that was chosen here before. Out: words by name, and a document that shows them.

const LANGUAGE = "keural.language";

const WORDS = {
  en: {
    skip: "Skip to the message field", conversations: "Conversations", close: "Close", fresh: "New conversation", export: "Export",
    exportHint: "Save all conversations to a file", import: "Import", importHint: "Add conversations from a file", otherLanguage: "한국어",
    language: "이 페이지를 한국어로 보기", settings: "Settings", welcome: "What would you like to talk about?", asks: "Things to ask",
    kept: "Conversations stay in this browser. The server keeps nothing.", message: "Message", send: "Send", stop: "Stop",
    keys: "Enter sends, Shift+Enter starts a new line. ", care: "Answers can be wrong.", system: "System message",
    systemDefault: "The model's own", blank: "An empty field means: as the model was saved.", reset: "Clear", done: "Done",
    cancel: "Cancel", keyTitle: "An API key is needed", keyWhy: "This server asks for a key. It is kept until this tab is closed.",
    keyField: "API key", you: "You", answer: "Answer", copy: "Copy", copied: "Copied", edit: "Edit", again: "Answer again", save: "Send",
    before: "Previous version", after: "Next version", version: "Version {0} of {1}", remove: "Delete", removeAsk: "Delete “{0}”?",
    untitled: "New conversation", writing: "The answer is being written", waiting: "Waiting", queued: "Waiting, number {0} in line ·", code: "Code", image: "image", table: "Table",
    stats: "{0} tokens · {1}/s · first after {2} s", prompt: "prompt {0} ({1} reused)", stopped: "stopped",
    length: "cut at its length", broken: "did not end", imported: "{0} conversations added", copyFailed: "The browser did not let it be copied",
    badFile: "This file has no conversations that can be read: {0}", noStore: "This browser keeps nothing here: what is written is lost with the tab",
    temperature: "Temperature", top_p: "Top-p", repetition_penalty: "Repetition penalty", max_tokens: "Longest answer (tokens)", seed: "Seed",
    badNumber: "From {0} to {1}", offline: "The server cannot be reached", invalid_api_key: "The server does not know this key",
    queue_full: "The server is busy; try again in {0} s", shutting_down: "The server is shutting down",
    context_length_exceeded: "This conversation has become too long for the model", deadline_exceeded: "The answer took too long",
    body_too_large: "This message is too large", host_not_allowed: "The server does not answer to this name", cut_off: "The connection ended before the answer did",
    failed: "The server could not answer", plain: "shown as plain text", empty_answer: "(an empty answer)",
  },
  ko: {
    skip: "메시지 입력란으로 건너뛰기", conversations: "대화 목록", close: "닫기", fresh: "새 대화", export: "내보내기",
    exportHint: "모든 대화를 파일로 저장", import: "가져오기", importHint: "파일에서 대화 추가", otherLanguage: "English",
    language: "Show this page in English", settings: "설정", welcome: "무엇에 대해 이야기할까요?", asks: "물어볼 만한 것",
    kept: "대화는 이 브라우저에만 남습니다. 서버에는 아무것도 저장되지 않습니다.", message: "메시지", send: "보내기", stop: "멈추기",
    keys: "Enter로 보내고 Shift+Enter로 줄을 바꿉니다. ", care: "답변이 틀릴 수 있습니다.", system: "시스템 메시지",
    systemDefault: "모델의 기본값", blank: "비워 두면 모델에 저장된 값을 씁니다.", reset: "비우기", done: "완료",
    cancel: "취소", keyTitle: "API 키가 필요합니다", keyWhy: "이 서버는 키를 요구합니다. 키는 이 탭을 닫을 때까지만 보관됩니다.",
    keyField: "API 키", you: "나", answer: "답변", copy: "복사", copied: "복사됨", edit: "고치기", again: "다시 답변", save: "보내기",
    before: "이전 버전", after: "다음 버전", version: "{1}개 중 {0}번째 버전", remove: "삭제", removeAsk: "‘{0}’ 대화를 삭제할까요?",
    untitled: "새 대화", writing: "답변을 쓰고 있습니다", waiting: "기다리는 중", queued: "기다리는 중, 대기 {0}번째 ·", code: "코드", image: "그림", table: "표",
    stats: "토큰 {0}개 · 초당 {1}개 · 첫 토큰 {2}초", prompt: "입력 {0} (재사용 {1})", stopped: "멈춤",
    length: "길이 제한에서 끊김", broken: "끝나지 않음", imported: "대화 {0}개를 추가했습니다", copyFailed: "브라우저가 복사를 허용하지 않았습니다",
    badFile: "이 파일에서 대화를 읽을 수 없습니다: {0}", noStore: "이 브라우저에는 저장할 수 없습니다. 탭을 닫으면 대화가 사라집니다",
    temperature: "온도", top_p: "Top-p", repetition_penalty: "반복 벌점", max_tokens: "답변 최대 길이(토큰)", seed: "시드",
    badNumber: "{0}부터 {1}까지", offline: "서버에 연결할 수 없습니다", invalid_api_key: "서버가 모르는 키입니다",
    queue_full: "서버가 바쁩니다. {0}초 뒤에 다시 시도하세요", shutting_down: "서버가 종료되고 있습니다",
    context_length_exceeded: "대화가 모델이 읽을 수 있는 길이를 넘었습니다", deadline_exceeded: "답변이 제한 시간을 넘었습니다",
    body_too_large: "메시지가 너무 큽니다", host_not_allowed: "이 이름으로는 서버를 쓸 수 없습니다", cut_off: "답변이 끝나기 전에 연결이 끊겼습니다",
    failed: "서버가 답하지 못했습니다", plain: "서식 없이 표시", empty_answer: "(빈 답변)",
  },
};

function remembered() {
  try {
    return localStorage.getItem(LANGUAGE);
  } catch {
    return null; // storage is switched off
  }
}

let language = remembered() ?? (navigator.language.toLowerCase().startsWith("ko") ? "ko" : "en");
if (!(language in WORDS)) language = "en";

/** Words by their name; `{0}` and so on are replaced. */
export function say(name, ...values) {
  return (WORDS[language][name] ?? name).replace(/\{(\d)\}/g, (_, place) => String(values[place]));
}

/** Whether there are words of this name. */
export function known(name) {
  return Object.hasOwn(WORDS.en, name);
}

/** A number as people of this language write it. */
export function number(value, digits = 0) {
  return value.toLocaleString(language, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Change to the other language. */
export function switchLanguage() {
  language = language === "ko" ? "en" : "ko";
  try {
    localStorage.setItem(LANGUAGE, language);
  } catch {
    // it holds until the page is loaded again
  }
}

/** Put words where `data-words`, `data-label`, `data-hint` and `data-placeholder` name them. */
export function fill(root) {
  document.documentElement.lang = language;
  for (const node of root.querySelectorAll("[data-words]")) node.textContent = say(node.dataset.words);
  for (const node of root.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", say(node.dataset.label));
    if (node.tagName === "BUTTON") node.title = say(node.dataset.label);
  }
  for (const node of root.querySelectorAll("[data-hint]")) node.title = say(node.dataset.hint);
  for (const node of root.querySelectorAll("[data-placeholder]")) node.placeholder = say(node.dataset.placeholder);
}
