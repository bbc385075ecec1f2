"""The page in a real Chromium, on a server whose network writes what a test wants.

Needs Debian's `chromium` and playwright from PyPI: `make test-page`.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from keural.serve.server.keys import Keys
from keural.serve.server.service import Service
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import PATIENCE, Writing, quick, service_of, serving, wait_until

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

WATCH = """
window.seen = {violations: []};
document.addEventListener("securitypolicyviolation", (event) =>
  seen.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""
KEPT = """new Promise((found, fail) => {
  const request = indexedDB.open("keural");
  request.onerror = () => fail(request.error);
  request.onsuccess = () => {
    const all = request.result.transaction("conversations").objectStore("conversations").getAll();
    all.onsuccess = () => { request.result.close(); found(all.result); };
  };
})"""
"""The conversations that the browser keeps."""
LONGEST_TASK = 50
"""Milliseconds of the processor."""
TRIES = 5
"""A processor that others use, too, is slower: the shortest of so many counts."""
ENTER = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "nativeVirtualKeyCode": 13}


class Served:
    """A server, and what its network was asked."""

    def __init__(self, service: Service, slots: Writing, address: str) -> None:
        self.service, self.slots, self.address = service, slots, address
        self.gate = threading.Event()
        self.gate.set()


class Open:
    """The page in a tab, and everything it asked for."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.requests: list[Any] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.add_init_script(WATCH)
        self.load()

    def load(self) -> None:
        self.page.goto(f"{self.address}/")
        self.page.wait_for_selector("body[data-ready]")

    def until(self, expression: str, seconds: float = PATIENCE) -> None:
        """Wait until it is true; playwright's own way would break the policy (`eval`)."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(20)

    def send(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def ended(self) -> None:
        self.page.wait_for_selector("#stop", state="hidden")
        self.until("document.querySelectorAll('.writing').length === 0")

    def ask(self, text: str) -> None:
        self.send(text)
        self.ended()

    @property
    def answers(self) -> list[str]:
        return [found.strip() for found in self.page.locator(".assistant .body").all_inner_texts()]

    @property
    def questions(self) -> list[str]:
        return [found.strip() for found in self.page.locator(".user .body").all_inner_texts()]

    @property
    def asked(self) -> list[list[tuple[str, str]]]:
        """The conversations that were sent."""
        posts = [json.loads(request.post_data) for request in self.requests if request.method == "POST"]
        return [[(message["role"], message["content"]) for message in post["messages"]] for post in posts]

    def check(self) -> None:
        """What must hold at the end of every test: it asked nobody else, broke no rule and has no error."""
        foreign = [request.url for request in self.requests if not request.url.startswith((self.address + "/", "data:", "blob:"))]
        assert foreign == []
        assert self.page.evaluate("seen.violations") == []
        assert self.errors == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


Start = Callable[..., Served]
Visit = Callable[..., Open]


@pytest.fixture
def start(tokenizer: KeuralTokenizer) -> Iterator[Start]:
    """Starts servers whose network writes a text; `steps` is called before each token."""
    with contextlib.ExitStack() as stack:

        def begin(text: str = "the cat sees a small red house", context_length: int = 400, **settings: Any) -> Served:
            served: list[Served] = []

            def before_step() -> None:
                if served:
                    assert served[0].gate.wait(PATIENCE)

            slots = Writing(tokenizer, text, context_length=context_length, before_step=before_step)
            service = service_of(tokenizer, slots, **({"limits": quick()} | settings))
            client = stack.enter_context(serving(service))
            served.append(Served(service, slots, str(client.base_url).rstrip("/")))
            stack.callback(served[0].gate.set)
            return served[0]

        yield begin


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """Opens the page of a server; keywords are of the browser's context. What must hold of every visit is checked at its end."""
    with contextlib.ExitStack() as stack:

        def begin(served: Served, **context: Any) -> Open:
            opened = browser.new_context(**({"locale": "en-US"} | context))
            stack.callback(opened.close)
            opened.set_default_timeout(1000 * PATIENCE)
            opened.grant_permissions(["clipboard-read", "clipboard-write"], origin=served.address)
            page = Open(opened.new_page(), served.address)
            stack.callback(page.check)
            return page

        yield begin


@contextlib.contextmanager
def timed(browser: Any, page: Open) -> Iterator[list[float]]:
    """Milliseconds of the processor that each task of a page takes within the block, there after it; nobody else's are in them."""
    found: list[float] = []
    browser.start_tracing(page=page.page, categories=["toplevel", "__metadata"])
    yield found
    trace = json.loads(browser.stop_tracing())["traceEvents"]
    main = {(one["pid"], one["tid"]) for one in trace if one["name"] == "thread_name" and one["args"]["name"] == "CrRendererMain"}
    tasks = [one for one in trace if one["name"].endswith("RunTask") and (one["pid"], one["tid"]) in main and "tdur" in one]
    assert tasks, "the browser says nothing of its tasks"
    found += [one["tdur"] / 1000 for one in tasks]


def ask_beside(served: Served) -> None:
    """Somebody else's question."""
    httpx.post(f"{served.address}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}, timeout=PATIENCE)


def prompts(served: Served, tokenizer: KeuralTokenizer) -> list[str]:
    return [tokenizer.decode(prompt) for prompt in served.slots.prompts]


class TestAnAnswer:
    def test_is_shown_as_it_comes(self, start: Start, visit: Visit) -> None:
        served = start("the cat sees a small red house and two blue birds")
        page = visit(served)
        steps = threading.Semaphore(0)
        served.slots.before_step = lambda: steps.acquire(timeout=PATIENCE)
        page.send("hello")
        for _ in range(6):
            before = len("".join(page.answers))
            steps.release(2)
            wait_until(lambda before=before: len("".join(page.answers)) > before)  # type: ignore[misc]
        steps.release(1000)
        page.ended()

        assert page.answers == ["the cat sees a small red house and two blue birds"]
        assert page.asked == [[("user", "hello")]]
        figures = page.page.inner_text(".assistant .figures")
        assert f"{len(served.slots.ids)} tokens" in figures or f"{len(served.slots.ids) - 1} tokens" in figures
        assert "/s" in figures

    @pytest.mark.parametrize(("locale", "words"), [("en-US", "number [23] in line"), ("ko-KR", "대기 [23]번째")])
    def test_says_how_many_are_before_it(self, start: Start, visit: Visit, locale: str, words: str) -> None:
        served = start()
        page = visit(served, locale=locale)
        served.gate.clear()
        others = [threading.Thread(target=ask_beside, args=(served,)) for _ in range(3)]  # one or two of them have places
        for other in others:
            other.start()
        wait_until(lambda: served.service.answers.open == 3)
        page.send("hello")
        page.until(f"/{words}/.test(document.querySelector('.assistant .count').textContent)")
        served.gate.set()
        page.ended()
        for other in others:
            other.join()

        assert page.answers == ["the cat sees a small red house"]

    def test_follows_the_whole_conversation(self, start: Start, visit: Visit) -> None:
        page = visit(start("two blue birds"))
        page.ask("one")
        page.ask("two")

        assert page.asked[1] == [("user", "one"), ("assistant", "two blue birds"), ("user", "two")]

    def test_has_the_settings_that_were_chosen(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        page.page.click("#open-settings")
        page.page.fill("#system", "Be brief.")
        page.page.fill("#parameter-max_tokens", "2")
        page.page.fill("#parameter-temperature", "0.5")
        page.page.click("#settings .main")
        page.ask("hello")
        sent = json.loads(page.requests[-1].post_data)

        assert page.asked == [[("system", "Be brief."), ("user", "hello")]]
        assert (sent["max_tokens"], sent["temperature"]) == (2, 0.5)
        assert "top_p" not in sent
        assert "cut at its length" in page.page.inner_text(".assistant .figures")

    def test_that_is_copied_twice_looks_as_before(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        page.ask("hello")
        button = page.page.locator(".assistant [data-do=copy]")
        before = button.inner_html()
        button.click()
        page.page.wait_for_timeout(300)
        button.click()
        wait_until(lambda: button.inner_html() == before)
        page.page.wait_for_timeout(1500)

        assert button.inner_html() == before

    def test_can_be_copied(self, start: Start, visit: Visit) -> None:
        page = visit(start("a **red** house"))
        page.ask("hello")
        page.page.click(".assistant [data-do=copy]")

        wait_until(lambda: page.page.evaluate("navigator.clipboard.readText()") == "a **red** house")


class TestStop:
    @pytest.mark.parametrize("how", ["button", "escape"])
    def test_frees_the_slot_and_keeps_what_came(self, start: Start, visit: Visit, how: str) -> None:
        served = start("the cat " * 60)
        served.slots.before_step = lambda: time.sleep(0.03)
        page = visit(served)
        page.send("hello")
        wait_until(lambda: len("".join(page.answers)) > 20)
        page.page.click("#stop") if how == "button" else page.page.keyboard.press("Escape")
        wait_until(lambda: served.service.answers.open == 0)
        page.ended()

        assert served.service.answers.scheduler.stats.finished == {"cancelled": 1}
        assert 20 < len(page.answers[0]) < len("the cat " * 60)
        assert "stopped" in page.page.inner_text(".assistant .figures")


class TestVersions:
    def test_an_answer_is_asked_for_again(self, start: Start, visit: Visit) -> None:
        page = visit(start("two blue birds"))
        page.ask("hello")
        page.page.click(".assistant [data-do=again]")
        page.ended()

        assert page.asked == [[("user", "hello")]] * 2
        assert page.page.inner_text(".assistant .place") == "2 / 2"
        page.page.click(".assistant [data-do=before]")
        assert page.page.inner_text(".assistant .place") == "1 / 2"
        assert page.answers == ["two blue birds"]

    def test_a_turn_is_changed_and_the_old_branch_kept(self, start: Start, visit: Visit) -> None:
        page = visit(start("two blue birds"))
        page.ask("one")
        page.ask("two")
        page.page.click(".user [data-do=edit] >> nth=0")
        page.page.fill(".edit textarea", "another")
        page.page.press(".edit textarea", "Enter")
        page.ended()

        assert page.asked[-1] == [("user", "another")]
        assert page.questions == ["another"]
        page.page.click(".user [data-do=before]")
        assert page.questions == ["one", "two"]

    def test_a_change_can_be_left(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        page.ask("one")
        page.page.click(".user [data-do=edit]")
        page.page.press(".edit textarea", "Escape")

        assert page.questions == ["one"]
        assert len(page.asked) == 1


class TestWhatIsKept:
    def test_a_reload_shows_the_conversation(self, start: Start, visit: Visit) -> None:
        page = visit(start("two **blue** birds"))
        page.ask("one")
        page.page.click(".assistant [data-do=again]")
        page.ended()
        page.page.reload()
        page.page.wait_for_selector("body[data-ready]")

        assert (page.questions, page.answers) == (["one"], ["two blue birds"])
        assert page.page.inner_text(".assistant .place") == "2 / 2"
        assert page.page.locator("#list .open").all_inner_texts() == ["one"]

    def test_an_answer_that_was_under_way_is_kept_as_far_as_it_came(self, start: Start, visit: Visit) -> None:
        served = start("the cat " * 60)
        steps = threading.Semaphore(0)
        served.slots.before_step = lambda: steps.acquire(timeout=PATIENCE)
        page = visit(served)
        page.send("one")
        while "the cat" not in json.dumps(page.page.evaluate(KEPT)):
            steps.release()
            page.page.wait_for_timeout(50)
        page.page.reload()
        page.page.wait_for_selector("body[data-ready]")
        while served.service.answers.open:
            steps.release()
            page.page.wait_for_timeout(50)

        assert served.service.answers.scheduler.stats.finished == {"cancelled": 1}
        assert page.questions == ["one"]
        assert page.answers[0].startswith("the cat")
        assert "stopped" in page.page.inner_text(".assistant .figures")

    def test_goes_through_a_file(self, start: Start, visit: Visit, tmp_path: Path) -> None:
        served = start("two blue birds")
        page = visit(served)
        page.ask("one")
        with page.page.expect_download() as download:
            page.page.click("#export")
        download.value.save_as(tmp_path / "all.json")
        other = visit(served)
        other.page.set_input_files("#file", tmp_path / "all.json")
        other.page.wait_for_selector("#list .open")
        other.page.click("#list .open")
        other.page.wait_for_selector(".turn")

        assert (other.questions, other.answers) == (["one"], ["two blue birds"])

    @pytest.mark.parametrize(
        "text",
        [
            "nothing",
            "{}",
            '{"format": "keural-conversations", "version": 2, "conversations": []}',
            '{"format": "keural-conversations", "version": 1, "conversations": [{"title": "x"}]}',
            '{"format": "keural-conversations", "version": 1, "conversations": [{"title": "", "system": "", "created": 0, '
            '"updated": 0, "settings": {}, "turns": {"a": {"role": "tool", "content": "", "parent": "root"}}, "shown": {}}]}',
        ],
    )
    def test_a_file_of_another_kind_is_refused(self, start: Start, visit: Visit, tmp_path: Path, text: str) -> None:
        page = visit(start())
        (tmp_path / "bad.json").write_text(text)
        page.page.set_input_files("#file", tmp_path / "bad.json")
        page.page.wait_for_selector("#notice:not([hidden])")

        assert "no conversations that can be read" in page.page.inner_text("#notice")
        assert page.page.locator("#list .open").count() == 0

    def test_a_conversation_can_be_deleted(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        page.ask("one")
        page.page.on("dialog", lambda dialog: dialog.accept())
        page.page.hover("#list li")
        page.page.click("#list .icon")
        page.until("document.querySelectorAll('#list li').length === 0")
        page.page.reload()
        page.page.wait_for_selector("body[data-ready]")

        assert page.questions == []


def in_another_tab(first: Open) -> Open:
    """The conversation that was kept last, opened in a second tab."""
    second = Open(first.page.context.new_page(), first.address)
    second.page.click("#list .open")
    second.page.wait_for_selector(".turn")
    return second


class TestTwoTabs:
    def test_lose_nothing_of_each_other(self, start: Start, visit: Visit) -> None:
        first = visit(start("two blue birds"))
        first.ask("one")
        second = in_another_tab(first)
        first.ask("two")
        second.ask("three")
        (kept,) = second.page.evaluate(KEPT)
        first.page.evaluate("dispatchEvent(new Event('focus'))")
        first.page.wait_for_selector(".user .place")

        said = [(turn["role"], turn["content"]) for turn in kept["turns"].values()]
        assert sorted(said) == [("assistant", "two blue birds")] * 3 + [("user", "one"), ("user", "three"), ("user", "two")]
        assert first.questions == ["one", "two"]
        assert second.questions == ["one", "three"]

    def test_take_nothing_from_whoever_begins_to_edit_while_the_database_is_asked(self, start: Start, visit: Visit) -> None:
        first = visit(start("two blue birds"))
        first.ask("one")
        second = in_another_tab(first)
        second.ask("two")
        first.page.evaluate("""() => {
          const get = IDBObjectStore.prototype.get;
          IDBObjectStore.prototype.get = function (...given) {
            IDBObjectStore.prototype.get = get;
            const request = get.apply(this, given);
            request.addEventListener("success", () => setTimeout(() => setTimeout(() => (window.asked = true))));
            document.querySelector(".user [data-do=edit]").click();
            return request;
          };
          dispatchEvent(new Event("focus"));
        }""")
        first.until("window.asked === true")

        assert first.page.locator(".edit textarea").count() == 1

    def test_know_of_each_others_conversations(self, start: Start, visit: Visit) -> None:
        first = visit(start("two blue birds"))
        second = Open(first.page.context.new_page(), first.address)
        second.ask("one")
        first.page.evaluate("dispatchEvent(new Event('focus'))")
        first.page.wait_for_selector("#list .open")

        assert first.page.locator("#list .open").all_inner_texts() == ["one"]

    def test_do_not_bring_back_an_answer_that_never_came(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        page.page.route("**/v1/chat/completions", lambda route: route.abort())
        page.send("hello")
        page.page.wait_for_selector(".failure[role=alert]")
        page.until(f"{KEPT}.then(([one]) => Object.keys(one.turns).length === 1)")
        page.page.reload()
        page.page.wait_for_selector(".failure")

        assert (page.questions, page.answers) == (["hello"], [])


class TestABrowserThatKeepsNothing:
    def test_is_said_and_the_page_works(self, start: Start, visit: Visit) -> None:
        page = visit(start("two blue birds"))
        page.page.add_init_script("Object.defineProperty(window, 'indexedDB', {get() { throw new Error('not in private') }})")
        page.load()
        assert "keeps nothing" in page.page.inner_text("#notice")
        page.ask("one")
        page.page.click("#new")
        page.page.click("#list .open")
        page.page.wait_for_selector(".turn")

        assert (page.questions, page.answers) == (["one"], ["two blue birds"])

    def test_for_want_of_room_is_no_fault_of_a_file(self, start: Start, visit: Visit, tmp_path: Path) -> None:
        page = visit(start())
        turns = {"a": {"parent": "root", "role": "user", "content": "long " * 200_000}}
        whole = {"title": "x", "system": "", "created": 1, "updated": 1, "settings": {}, "turns": turns, "shown": {"root": "a"}}
        file = {"format": "keural-conversations", "version": 1, "conversations": [whole] * 3}
        (tmp_path / "all.json").write_text(json.dumps(file))
        devtools = page.page.context.new_cdp_session(page.page)
        devtools.send("Storage.overrideQuotaForOrigin", {"origin": page.address, "quotaSize": 1_500_000})
        page.page.set_input_files("#file", tmp_path / "all.json")
        page.until("document.querySelector('#notice').textContent.includes('keeps nothing')")

        assert page.page.evaluate(KEPT) == [], "all of a file is kept, or nothing"
        page.ask("hello")
        assert page.answers == ["the cat sees a small red house"]


class TestKorean:
    """What browsers send when Enter comes while a syllable is composed, in the orders that there are."""

    def compose(self, page: Open, text: str) -> Any:
        page.page.focus("#prompt")
        devtools = page.page.context.new_cdp_session(page.page)
        for end in range(1, len(text)):
            devtools.send("Input.imeSetComposition", {"text": text[end - 1], "selectionStart": 1, "selectionEnd": 1})
            devtools.send("Input.insertText", {"text": text[end - 1]})
        for step in ("ㅇ", "요", text[-1]):
            devtools.send("Input.imeSetComposition", {"text": step, "selectionStart": 1, "selectionEnd": 1})
        return devtools

    def check_sent_once(self, page: Open) -> None:
        page.page.wait_for_selector(".assistant")
        page.ended()
        page.page.wait_for_timeout(200)
        assert page.asked == [[("user", "안녕하세요")]]
        assert page.questions == ["안녕하세요"]
        assert page.page.input_value("#prompt") == ""

    def test_enter_before_the_composition_ends_and_after_it(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        devtools = self.compose(page, "안녕하세요")
        devtools.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **ENTER, "windowsVirtualKeyCode": 229})
        devtools.send("Input.insertText", {"text": "요"})
        devtools.send("Input.dispatchKeyEvent", {"type": "keyDown", "text": "\r", **ENTER})
        devtools.send("Input.dispatchKeyEvent", {"type": "keyUp", **ENTER})

        self.check_sent_once(page)

    def test_enter_before_the_composition_ends_alone(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        devtools = self.compose(page, "안녕하세요")
        devtools.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **ENTER, "windowsVirtualKeyCode": 229})
        assert page.asked == []
        devtools.send("Input.insertText", {"text": "요"})

        self.check_sent_once(page)

    def test_enter_that_comes_with_a_new_line(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        devtools = self.compose(page, "안녕하세요")
        devtools.send("Input.dispatchKeyEvent", {"type": "keyDown", "text": "\r", **ENTER, "windowsVirtualKeyCode": 229})
        devtools.send("Input.insertText", {"text": "요"})

        self.check_sent_once(page)

    @pytest.mark.parametrize("code", [13, 229])
    def test_enter_after_the_composition(self, start: Start, visit: Visit, code: int) -> None:
        page = visit(start())
        devtools = self.compose(page, "안녕하세요")
        devtools.send("Input.insertText", {"text": "요"})
        devtools.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **ENTER, "windowsVirtualKeyCode": code})

        self.check_sent_once(page)

    def test_shift_and_enter_start_a_line(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        page.page.fill("#prompt", "하나")
        page.page.press("#prompt", "Shift+Enter")
        page.page.keyboard.type("둘")
        page.page.press("#prompt", "Enter")
        page.ended()

        assert page.asked == [[("user", "하나\n둘")]]

    def test_in_another_script_enter_chooses_and_does_not_send(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        page.page.focus("#prompt")
        devtools = page.page.context.new_cdp_session(page.page)
        devtools.send("Input.imeSetComposition", {"text": "にほん", "selectionStart": 3, "selectionEnd": 3})
        devtools.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **ENTER, "windowsVirtualKeyCode": 229})
        devtools.send("Input.insertText", {"text": "日本"})
        page.page.wait_for_timeout(200)

        assert page.asked == []
        assert page.page.input_value("#prompt") == "日本"


HOSTILE = """<img src=x onerror="document.title='taken'"> <script>document.title='taken'</script></script>

<div><svg onload="document.title='taken'"></div>

[a](javascript:document.title='taken') [b](JaVaScRiPt:alert`1`) [c](data:text/html,<script>1</script>) [d](vbscript:x)
[e](/v1/models)

![tracker](https://evil.example/pixel.png?q=1) ![x](data:image/svg+xml;base64,AAAA "t") &lt;b&gt; &#60;script&#62;

[fine](https://example.com/a?b=c) <https://example.org> [mail](mailto:a@example.com)

<style>body{display:none}</style><base href="https://evil.example/"><meta http-equiv="refresh" content="0;url=https://evil.example">

```html
</code></pre><img src=x onerror=alert(1)>
```
"""


def fake(page: Open, *pieces: str, status: int = 200) -> None:
    """Answer instead of the server, with these pieces as they are."""
    events = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    events += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
    body = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=status, content_type="text/event-stream", body=body)
    )


class TestAHostileAnswer:
    def test_is_text(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        fake(page, *HOSTILE)
        page.ask("hello")
        page.page.wait_for_timeout(300)
        inside = page.page.evaluate(
            """[...document.querySelectorAll('.assistant .body *')].flatMap((node) =>
               [node.tagName, ...node.getAttributeNames().filter((name) => /^on|^style$|^src$/.test(name))])"""
        )

        assert page.page.title() == "hello · keural"
        assert not {"IMG", "SCRIPT", "SVG", "svg", "STYLE", "BASE", "META", "IFRAME", "onerror", "onload", "style", "src"} & set(
            inside
        )
        hrefs = page.page.eval_on_selector_all(".assistant .body a", "(all) => all.map((one) => one.getAttribute('href'))")
        assert hrefs == [
            "https://evil.example/pixel.png?q=1",
            "https://example.com/a?b=c",
            "https://example.org/",
            "mailto:a@example.com",
        ]
        assert "<img src=x onerror=" in page.answers[0]
        assert page.page.is_visible("#prompt")

    def test_may_come_from_the_network_itself(self, start: Start, visit: Visit) -> None:
        page = visit(start(HOSTILE[:160], context_length=2000))
        page.ask("hello")

        assert page.page.locator(".assistant .body img, .assistant .body script").count() == 0
        assert "<img src=x onerror=" in page.answers[0]

    @pytest.mark.parametrize(
        "pieces",
        [
            ["가" * 1_000_000],
            ["x" * 10_000] * 100,
            ["| a | b |\n|---|---|\n", *["| 하나 | two |\n"] * 20_000],
            ["```python\n", *["print('안녕')\n"] * 20_000, "```\n\nafter"],
            ["> " * 9_000 + "deep"],
            ["*_" * 9_000, "[" * 9_000, "\n\n", "- " * 3_000],
            ["word " * 2_000 + "\n\n"] * 40,
        ],
        ids=["megabyte line", "megabyte in pieces", "table", "code", "quotes", "signs", "prose"],
    )
    def test_that_is_huge_does_not_stop_the_page(self, start: Start, visit: Visit, pieces: list[str]) -> None:
        page = visit(start())
        fake(page, *pieces)
        page.send("hello")
        page.ended()
        page.until("document.querySelector('.assistant .tools button')")
        shown = page.page.evaluate("document.querySelector('.assistant .body').textContent.length")
        page.page.fill("#prompt", "still here")

        assert page.page.input_value("#prompt") == "still here"
        assert shown > 0.8 * len("".join(pieces))  # a table has no bars, and a row of signs is a rule
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    def test_after_a_huge_block_the_rest_is_formatted_again(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        fake(page, "```\n" + "line\n" * 5_000 + "```\n\n**after**\n\n" + "x" * 20_000, "\n\n# end\n")
        page.ask("hello")
        page.page.wait_for_selector(".assistant .body strong")
        page.page.wait_for_selector(".assistant .body h3")

        assert page.page.inner_text(".assistant .body strong") == "after"
        assert page.page.inner_text(".assistant .body h3") == "end"


class TestMarkdown:
    TEXT = """# 제목

**"예"**는 답이고 `코드`가 있다.

- 하나
- 둘

  셋

| 가 | 나 |
|--|--:|
| 1 | **2** |

```python
def f(x):
    return 1
```

1. a
2. b
"""

    def test_in_pieces_is_the_same_as_at_once(self, start: Start, visit: Visit) -> None:
        shown = []
        for pieces in ([self.TEXT], list(self.TEXT)):
            page = visit(start())
            fake(page, *pieces)
            page.ask("hello")
            shown.append(page.page.evaluate("document.querySelector('.assistant .body').innerHTML"))

        assert shown[0] == shown[1]
        assert '<strong>"예"</strong>는' in shown[0]
        assert '<span class="hl-keyword">def</span>' in shown[0]
        assert '<td class="right"><strong>2</strong></td>' in shown[0]

    def test_runs_as_its_words_do(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        fake(page, "مرحبا بالعالم\n\nhello\n\n- قائمة\n\n> اقتباس")
        page.ask("שלום עולם")
        ends = """(node) => {
          const range = document.createRange();
          range.selectNodeContents(node);
          const [inner, outer] = [range.getBoundingClientRect(), node.getBoundingClientRect()];
          return inner.left - outer.left > outer.right - inner.right ? "right" : "left";
        }"""
        way = "(all) => all.map((node) => getComputedStyle(node).direction)"

        assert [node.evaluate(ends) for node in page.page.locator(".assistant .body > p").all()] == ["right", "left"]
        assert page.page.locator(".assistant .body > :is(ul, blockquote)").evaluate_all(way) == ["rtl"] * 2
        assert page.page.locator(".assistant .body li").evaluate(ends) == "right"

    def test_what_is_settled_is_left_alone(self, start: Start, visit: Visit) -> None:
        served = start("the cat sees\n\nthe red house and two blue birds in the garden")
        page = visit(served)
        steps = threading.Semaphore(0)
        served.slots.before_step = lambda: steps.acquire(timeout=PATIENCE)
        page.send("hello")
        while page.page.locator(".assistant .body > p").count() == 0:  # one by one: what came just before a stop would wait with it
            steps.release()
            page.page.wait_for_timeout(50)
        assert page.page.locator(".assistant .live p").count() == 1
        page.page.evaluate("document.querySelector('.assistant .body > p').marked = true")
        steps.release(1000)
        page.ended()

        assert page.page.evaluate("document.querySelector('.assistant .body > p').marked") is True


class TestTrouble:
    def test_a_key_is_asked_for_and_kept_for_the_tab(self, start: Start, visit: Visit) -> None:
        page = visit(start(keys=Keys(["secret"])))
        page.page.wait_for_selector("#key[open]")
        page.page.fill("#key-value", "wrong")
        page.page.press("#key-value", "Enter")
        page.until("document.querySelector('#key').open && !document.querySelector('#key-value').value")
        page.page.fill("#key-value", "secret")
        page.page.press("#key-value", "Enter")
        page.until("document.querySelector('#model').textContent === 'tiny'")
        page.ask("hello")

        assert page.answers == ["the cat sees a small red house"]
        assert page.page.evaluate("sessionStorage.getItem('keural.key')") == "secret"
        assert "secret" not in page.page.evaluate("JSON.stringify(localStorage)")

    def test_what_the_server_says_is_shown_and_can_be_asked_again(self, start: Start, visit: Visit) -> None:
        served = start(context_length=60)
        page = visit(served)
        page.send("the cat " * 100)
        page.page.wait_for_selector(".failure[role=alert]")

        assert "too long for the model" in page.page.inner_text(".failure")
        assert "60" in page.page.inner_text(".failure")
        page.page.click(".user [data-do=edit]")
        page.page.fill(".edit textarea", "hello")
        page.page.press(".edit textarea", "Enter")
        page.ended()
        assert page.answers == ["the cat sees a small red house"]

    def test_a_stream_that_breaks_is_said(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        body = 'data: {"choices":[{"index":0,"delta":{"content":"half"},"finish_reason":null}]}\n\n'
        page.page.route(
            "**/v1/chat/completions", lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body)
        )
        page.ask("hello")

        assert page.answers == ["half"]
        assert "did not end" in page.page.inner_text(".assistant .figures")
        assert "ended before the answer did" in page.page.inner_text("#notice")

    def test_an_answer_that_was_there_stays_where_another_one_fails(self, start: Start, visit: Visit) -> None:
        page = visit(start("two blue birds"))
        page.ask("one")
        page.ask("two")
        page.page.route("**/v1/chat/completions", lambda route: route.abort())
        page.page.click(".assistant [data-do=again] >> nth=0")
        page.page.wait_for_selector("#notice:not([hidden])")

        assert "cannot be reached" in page.page.inner_text("#notice")
        assert (page.questions, page.answers) == (["one", "two"], ["two blue birds"] * 2)

    def test_a_server_that_is_gone_is_said(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        page.page.route("**/v1/chat/completions", lambda route: route.abort())
        page.send("hello")
        page.page.wait_for_selector(".failure[role=alert]")
        assert "cannot be reached" in page.page.inner_text(".failure")
        page.page.unroute("**/v1/chat/completions")
        page.page.click(".failure [data-do=retry]")
        page.page.wait_for_selector(".assistant")
        page.ended()

        assert page.answers == ["the cat sees a small red house"]
        assert page.questions == ["hello"]


class TestTheFrame:
    @pytest.mark.parametrize(
        ("locale", "words"), [("ko-KR", "새 대화"), ("en-US", "New conversation"), ("fr-FR", "New conversation")]
    )
    def test_speaks_the_browsers_language(self, start: Start, visit: Visit, locale: str, words: str) -> None:
        page = visit(start(), locale=locale)

        assert page.page.inner_text("#new") == words
        assert page.page.get_attribute("html", "lang") == locale[:2].replace("fr", "en")

    def test_the_language_can_be_changed(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        page.page.click("#language")
        assert page.page.inner_text("#new") == "새 대화"
        page.page.reload()
        page.page.wait_for_selector("body[data-ready]")
        assert page.page.inner_text("#new") == "새 대화"

    def test_works_with_the_keyboard_alone(self, start: Start, visit: Visit) -> None:
        page = visit(start())
        assert page.page.evaluate("document.activeElement.id") == "prompt"
        page.page.keyboard.type("hello")
        page.page.keyboard.press("Enter")
        page.ended()
        page.page.focus(".assistant [data-do=again]")
        page.page.keyboard.press("Enter")
        page.ended()

        assert len(page.asked) == 2

    def test_tells_a_screen_reader_when_an_answer_has_come(self, start: Start, visit: Visit) -> None:
        page = visit(start("two blue birds"))
        page.ask("hello")

        wait_until(lambda: page.page.inner_text("#status") == "Answer: two blue birds")

    @pytest.mark.parametrize("width", [390, 1280])
    def test_fits_its_window(self, start: Start, visit: Visit, width: int) -> None:
        page = visit(start(), viewport={"width": width, "height": 844})
        fake(
            page,
            TestMarkdown.TEXT + "\n" + "averylongword" * 60 + "\n\n| " + " | ".join(["wide"] * 40) + " |\n|" + "-|" * 40 + "\n",
        )
        page.ask("가나다라" * 60)

        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.page.evaluate("document.querySelector('#scroll').scrollWidth <= document.querySelector('#scroll').clientWidth")

    @pytest.mark.parametrize("theme", ["light", "dark"])
    @pytest.mark.parametrize("width", [390, 1280])
    def test_has_nothing_that_axe_finds(self, start: Start, visit: Visit, theme: str, width: int) -> None:
        axe = pytest.importorskip("axe_playwright_python", reason="axe is not installed (pip install axe-playwright-python)")
        page = visit(start(), color_scheme=theme, viewport={"width": width, "height": 844}, locale="ko-KR")
        fake(page, TestMarkdown.TEXT, "\n[link](https://example.com) > quote\n\n> quote\n")
        page.ask("안녕하세요")
        page.page.click(".assistant [data-do=again]")
        page.ended()
        page.page.evaluate(Path(axe.__file__).with_name("axe.min.js").read_text())
        find = "axe.run().then((found) => found.violations.map((one) => [one.id, one.nodes.map((node) => node.target.join(' '))]))"

        assert page.page.evaluate(find) == []
        page.page.click("#open-settings")
        assert page.page.evaluate(find) == []

    def test_a_long_conversation_is_drawn_in_short_tasks(self, browser: Any, start: Start, visit: Visit, tmp_path: Path) -> None:
        turns: dict[str, Any] = {}
        shown, parent = {}, "root"
        for place in range(300):
            role = "user" if place % 2 == 0 else "assistant"
            turns[f"t{place}"] = {"parent": parent, "role": role, "content": TestMarkdown.TEXT if place % 2 else f"질문 {place}"}
            shown[parent] = parent = f"t{place}"
        whole = {"title": "long", "system": "", "created": 1, "updated": 1, "settings": {}, "turns": turns, "shown": shown}
        (tmp_path / "long.json").write_text(json.dumps({"format": "keural-conversations", "version": 1, "conversations": [whole]}))
        page = visit(start())
        page.page.set_input_files("#file", tmp_path / "long.json")
        page.page.wait_for_selector("#list .open")
        longest = []
        while len(longest) < TRIES and min(longest, default=LONGEST_TASK) >= LONGEST_TASK:
            page.page.click("#new")
            with timed(browser, page) as tasks:
                page.page.click("#list .open")
                page.until("document.querySelectorAll('.turn').length === 300", 4 * PATIENCE)  # in pauses, of which there are few
            longest.append(max(tasks))

        assert page.page.evaluate("document.querySelector('.turn .body').textContent") == "질문 0"
        assert min(longest) < LONGEST_TASK, longest


class TestThingsToAsk:
    def test_are_shown_as_text_before_the_first_message_and_ask_themselves(self, start: Start, visit: Visit) -> None:
        asks = ["What is seven plus twelve?", "<b onclick=alert(1)>누구세요?</b>"]
        served = start(facts={"suggestions": asks})
        page = visit(served)

        page.page.wait_for_selector(".ask")
        assert page.page.locator(".ask").all_inner_texts() == asks
        assert page.page.locator(".ask b").count() == 0
        page.page.locator(".ask").nth(1).click()
        page.ended()
        assert page.asked == [[("user", asks[1])]]
        assert not page.page.locator("#asks").is_visible()
        page.page.click("#new")
        assert page.page.locator("#asks").is_visible()

    def test_are_not_there_for_a_model_without(self, start: Start, visit: Visit) -> None:
        page = visit(start())

        page.until("document.getElementById('model').textContent !== ''")
        assert page.page.locator(".ask").count() == 0
        assert not page.page.locator("#asks").is_visible()
