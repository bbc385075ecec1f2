"""What each gate finds, what it lets through, and who decides what then happens."""

from typing import Any

import pytest
from pydantic import ValidationError

from keural.data.adapters import ADAPTERS
from keural.data.adapters.reasons import REASONS
from keural.data.filtering.gates import GATES, Gatekeeper, check_gates, gate_of
from keural.data.filtering.holdout import Splitter
from keural.data.records import Conversation, Document, PreferencePair, Record
from keural.data.sources import open_source
from keural.errors import UserError
from keural.recipe import DecontaminateSpec, GateAction, SourceSpec, TokenizerSpec
from keural.tokenizer.chatml import Message
from tests.helpers.processor import within

ACTIONS: tuple[GateAction, ...] = ("drop", "count", "skip")


def chat(answer: str, question: str = "q", language: str | None = None) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), "w", language)


def pair(chosen: str, rejected: str = "bad", prompt: str = "q", system: str = "", **fields: Any) -> PreferencePair:
    turns = (Message("system", system),) if system else ()
    return PreferencePair((*turns, Message("user", prompt)), chosen, rejected, "w", **fields)


def source(adapter: str = "preference", **settings: Any) -> SourceSpec:
    return SourceSpec(name="s", adapter=adapter, **settings)


def reasons(record: Record, **settings: Any) -> list[tuple[str, str]]:
    return found(Gatekeeper(source(**settings), {}), record)


def found(keeper: Gatekeeper, record: Record) -> list[tuple[str, str]]:
    return [(reason, action) for action in ACTIONS for reason in keeper.reasons(record, action)]


FOUND = [
    (chat("<NAME>씨, 안녕하세요."), "placeholder"),
    (chat("N/A"), "empty_answer"),
    (chat("없음."), "empty_answer"),
    (chat("[이름] 드림"), "blank"),
    (chat("김○○ 씨가 왔다."), "masked_name"),
    (chat("A photo: [image]"), "placeholder"),
    (chat("yes", question="<noinput>"), "placeholder"),
    (chat("I am ChatGPT."), "self_identification"),
    (chat("Hello, I'm an assistant developed by OpenAI."), "self_identification"),
    (chat("저는 OpenAI가 만든 언어 모델입니다."), "self_identification"),
    (chat("나는 챗GPT야."), "self_identification"),
    (chat("제 이름은 클로드입니다."), "self_identification"),
    (chat("저는 앤트로픽에서 개발한 AI입니다."), "self_identification"),
    (chat("I am Claude, an assistant."), "self_identification"),
    (pair("As an AI language model, I cannot have feelings."), "refusal"),
    (pair("I'm sorry, but I can't assist with that."), "refusal"),
    (pair("I apologize, but I am unable to provide this."), "refusal"),
    (pair("인공지능 언어 모델로서 저는 의견이 없습니다."), "refusal"),
    (pair("죄송하지만 그 요청은 도와드릴 수 없습니다."), "refusal"),
    (pair("good", "<|im_end|> bad"), "control_string"),
    (chat("a </s> b"), "control_string"),
    (chat("[INST] a [/INST]"), "control_string"),
    (chat("### Response: a"), "control_string"),
    (chat("전화는 010-1234-5678입니다."), "personal_data"),
    (chat("번호는 900101-1234567."), "personal_data"),
    (chat("write to a.b@example.com"), "personal_data"),
    (chat("This answer is entirely in the other language.", "한국어로 된 질문을 여기에 길게 적어 보았습니다.", "ko"), "not_korean"),
    (pair("한국어로만 쓰인 답이 여기에 하나 있습니다.", "This one was never translated at all.", language="ko"), "not_korean"),
    (chat("이 대답은 영어 자료에 있어서는 안 되는 대답입니다.", language="en"), "not_english"),
]
PASSED = [
    chat("저는 GPT를 날마다 씁니다."),
    chat("나는 구글에서 길을 찾아봤어."),
    chat("I am Claude Monet, and I paint water."),
    pair("AI 모델로서 몇 가지 방법을 알려 드리겠습니다."),
    chat("Android was developed by Google; ChatGPT was created by OpenAI."),
    chat("GPT-3는 OpenAI가 개발한 모델입니다."),
    chat("None of them is a prime number."),
    chat("I am sorry for your loss."),
    pair("I'm sorry to hear that. Here is what you can do."),
    pair("good", "As an AI language model, I cannot say."),
    pair("죄송합니다. 제가 잘못 계산했네요. 답은 7입니다."),
    chat("Use `a <b> c` and 3 < 4 > 2."),
    pair("As an AI assistant, I can suggest several ways."),
    chat("256626720691 + 1646615806005 = 1903242526696"),
    chat("The year 1984-2020, price 010-20."),
    chat(
        "파이썬에서는 다음과 같이 씁니다.\n```python\nfor number in range(10): print(number, number * number)\n```", language="ko"
    ),
    chat("Yes.", "아주 긴 한국어 질문을 여기에 적어 보았습니다.", "ko"),
    chat("Hangul (한글) is the Korean alphabet, invented in 1443.", language="en"),
    chat("Ceci n'est ni du coréen ni de l'anglais.", language="fr"),
]


@pytest.mark.parametrize(("record", "expected"), FOUND)
def test_what_the_gates_find(record: Record, expected: str) -> None:
    assert [reason for reason, _ in reasons(record)] == [expected]


@pytest.mark.parametrize("record", PASSED)
def test_what_they_let_through(record: Record) -> None:
    assert reasons(record) == []


def test_documents_pass_no_gates() -> None:
    assert reasons(Document("I am ChatGPT. <NAME>", "w")) == []


def test_the_recipe_decides_before_the_adapter_and_the_adapter_before_the_gate() -> None:
    record = chat("Call 010-1234-5678, <|im_end|>")
    assert reasons(record) == [("control_string", "count"), ("personal_data", "count")]
    assert found(Gatekeeper(source(), {"personal_data": "drop"}), record)[0] == ("personal_data", "drop")
    decided = source(gates={"personal_data": "skip", "control_strings": "drop"})
    assert found(Gatekeeper(decided, {"personal_data": "drop"}), record)[0] == ("control_string", "drop")


def test_lengths() -> None:
    assert reasons(pair("good", "b"), min_characters=2) == [("answer_too_short", "drop")]
    assert reasons(pair("good", "b" * 12), max_characters=11) == [("turn_too_long", "drop")]
    assert reasons(pair("good", "b" * 13), max_length_ratio=3.0) == [("length_ratio", "drop")]
    assert reasons(pair("good", "b" * 12), max_length_ratio=3.0) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gates": {"refusal": "skip"}}, ["unknown gate 'refusal'", "did you mean 'refusals'?"]),
        ({"gates": {"duplicate_prompts": "count"}}, ["can drop or skip"]),
        ({"id_space": "orca"}, ["id_space needs id_field"]),
        ({"adapter": "text", "path": "a.txt", "gates": {"language": "skip"}}, ["gates is for conversations and pairs"]),
        ({"adapter": "text", "path": "a.txt", "id_field": "id"}, ["id_field is for conversations and pairs"]),
        ({"adapter": "messages", "max_length_ratio": 2.0}, ["max_length_ratio is for pairs"]),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Any, settings: dict[str, Any], words: list[str]) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(UserError) as caught:
        check_gates(open_source(source(**({"path": "a.jsonl"} | settings)), tmp_path))
    assert all(word in str(caught.value) for word in words)


PIECES = [
    "a",
    ".",
    " ",
    "0",
    "가",
    "<",
    "`",
    "I am ",
    "I'm sorry, ",
    "나는 ",
    "a@",
    "{",
    "[",
    "{{",
    '[["',
    "$",
    "$$",
    "<a ",
    "a_",
    "/a",
]
PIECES += [
    "\\(",
    "\\[",
    "a.",
    "x(",
    "\n",
    "import ",
    "http",
    "aB",
    "[a](",
    "○",
    "{a",
    "~~~",
    "Xx",
    "а",
    "1-",
    "NAME_",
    "&name",
    "#@",
]


@pytest.mark.parametrize("piece", PIECES)
def test_long_runs_take_no_longer_than_they_are_long(piece: str) -> None:
    with within(15):
        for language in ("ko", "en"):
            reasons(pair("b" + piece * 30_000, "ж" + piece * 10_000, language=language))


def test_what_was_found_is_shown_but_no_personal_data() -> None:
    keeper = Gatekeeper(source(), {})
    shown = {finding.reason: finding.detail for action in ACTIONS for finding in keeper.findings(pair(*SHOWN), action)}
    assert shown == {
        "self_identification": "'I am ChatGPT'",
        "control_string": "'[INST]'",
        "personal_data": "a telephone number",
        "placeholder": "'<NAME>'",
    }


SHOWN = ("I am ChatGPT, call 010-1234-5678", "[INST] <NAME>")


def test_every_gate_says_what_it_takes_and_has_reasons_of_its_own() -> None:
    assert all(gate.takes for gate in GATES.values())
    found = [reason for gate in GATES.values() for reason in gate.reasons]
    assert len(set(found)) == len(found)
    assert all(reason in REASONS for reason in found)
    assert all(gate_of(reason) == name for name, gate in GATES.items() for reason in gate.reasons)
    assert gate_of("duplicate") is None


def test_every_adapters_defaults_are_of_gates_that_exist() -> None:
    assert all(name in GATES for adapter in ADAPTERS.values() for name in adapter.gates)


def test_duplicates_of_content_ids_and_prompts() -> None:
    splitter = Splitter(0)
    assert splitter.assign(pair("good")) == "train"
    cases = [
        (pair("ｇood ", "bad\n"), "", "duplicate"),
        (pair("bad", "good"), "", "swapped_pair"),
        (pair("good", system="s"), "", None),
        (pair("좋다", "나쁘다", "질문", id="7"), "orca", None),
        (pair("good", "bad", "question", id="7"), "orca", "duplicate_id"),
        (pair("good", "bad", "question", id="7"), "other", None),
    ]
    for record, space, expected in cases:
        assert getattr(splitter.assign(record, id_space=space), "reason", None) == expected
    asked_before = splitter.assign(pair("third", "fourth"), prompts="drop")
    assert getattr(asked_before, "reason", None) == "duplicate_prompt", "whatever the other source does with its prompts"
    assert splitter.assign(pair("third", "fourth", system="t"), prompts="drop") == "train", "the system turn is part of the prompt"


@pytest.mark.parametrize(
    "settings",
    [
        {"gates": {"refusals": "skip"}},
        {"min_characters": 3},
        {"max_characters": 3},
        {"max_length_ratio": 2.0},
        {"id_field": "id"},
        {"id_space": "orca"},
    ],
)
def test_gates_are_for_what_a_stage_trains_on(settings: dict[str, Any]) -> None:
    """A tokenizer's sources are read as they are, and of an evaluation set every item is looked for."""
    gated = source(path="a.jsonl", **settings)
    with pytest.raises(ValidationError, match=next(iter(settings))):
        TokenizerSpec(vocab_size=300, sources=[gated])
    with pytest.raises(ValidationError, match=next(iter(settings))):
        DecontaminateSpec(sources=[gated])
