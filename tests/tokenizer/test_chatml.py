"""ChatML by ids: what is trained, that nothing can be injected, and that transformers' template gives the same."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from keural.errors import UserError
from keural.tokenizer import KeuralTokenizer, Message, ParsedAnswer, ToolCall, parse_answer, render, render_prompt, with_calls
from keural.tokenizer.message import CALLED
from tests.helpers.examples import examples

MARKERS = ["<|im_start|>", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "<bos>", "<eos>", "<pad>", "<unk>", "<0x0A>"]
CONTENT = st.lists(st.one_of(st.sampled_from(MARKERS), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))).map("".join)
CONVERSATIONS = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), CONTENT), max_size=5)

TALK = [
    Message("system", "너는 한국어와 영어를 하는 비서야."),
    Message("user", "파이썬으로 인사해 줘.\nIn one line, please!"),
    Message("assistant", '네, 여기 있습니다.\n\n    print("안녕")'),
    Message("user", "고마워"),
    Message("assistant", "천만에요 😀"),
]


def test_turn_is_markers_role_and_content(either: KeuralTokenizer) -> None:
    rendered = render(either, [Message("user", "안녕"), Message("assistant", "hi")])
    encode = either.encode
    assert rendered.ids == [
        *(either.im_start_id, *encode("user\n"), *encode("안녕"), either.im_end_id, *encode("\n")),
        *(either.im_start_id, *encode("assistant\n"), *encode("hi"), either.im_end_id, *encode("\n")),
    ]
    assert either.decode(rendered.ids, skip_special_tokens=False) == (
        "<|im_start|>user\n안녕<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
    )


def test_trained_are_content_and_end_marker_of_assistant_turns(either: KeuralTokenizer) -> None:
    rendered = render(either, TALK)
    trained = [token_id for token_id, mask in zip(rendered.ids, rendered.mask, strict=True) if mask]
    expected = [[*either.encode(message.content), either.im_end_id] for message in TALK if message.role == "assistant"]
    assert trained == expected[0] + expected[1]
    assert rendered.mask[-1] == 0, "the newline after the last marker is not trained"


def test_serving_prompt_is_what_training_shows_before_the_answer(either: KeuralTokenizer) -> None:
    prompt, whole = render_prompt(either, TALK[:2]), render(either, TALK[:3])
    assert whole.ids[: len(prompt)] == prompt
    assert whole.mask[: len(prompt)] == [0] * len(prompt)
    assert whole.mask[len(prompt)] == 1


@pytest.mark.hypothesis
def test_part_of_a_conversation_is_a_prefix_of_the_whole(either: KeuralTokenizer) -> None:
    @examples(25)
    @given(CONVERSATIONS)
    def check(messages: list[Message]) -> None:
        whole = render(either, messages)
        for count in range(len(messages) + 1):
            part = render(either, messages[:count])
            assert whole.ids[: len(part.ids)] == part.ids
            assert whole.mask[: len(part.mask)] == part.mask

    check()


@pytest.mark.hypothesis
def test_content_never_yields_control_ids(either: KeuralTokenizer) -> None:
    @examples(50)
    @given(CONVERSATIONS)
    def check(messages: list[Message]) -> None:
        ids = render(either, messages).ids
        assert ids.count(either.im_start_id) == ids.count(either.im_end_id) == len(messages)
        assert not {either.pad_id, either.bos_id, either.eos_id, either.unk_id} & set(ids)

    check()


@pytest.mark.hypothesis
def test_lossless_rendering_keeps_content_that_spells_markers(lossless: KeuralTokenizer) -> None:
    @examples(25)
    @given(CONTENT)
    def check(content: str) -> None:
        rendered = render(lossless, [Message("assistant", content)])
        trained = [token_id for token_id, mask in zip(rendered.ids, rendered.mask, strict=True) if mask]
        assert lossless.decode(trained) == content

    check()


@pytest.mark.parametrize("role", ["alien", "User", "", "assistant\n"])
def test_unknown_role_is_refused(lossless: KeuralTokenizer, role: str) -> None:
    with pytest.raises(UserError, match="unknown role"):
        render(lossless, [Message(role, "x")])


@pytest.fixture(scope="module")
def loaded() -> dict[str, PreTrainedTokenizerBase]:
    """What `in_transformers` has loaded, by the tokenizer's sha256."""
    return {}


@pytest.fixture
def in_transformers(either: KeuralTokenizer, loaded: dict[str, PreTrainedTokenizerBase], tmp_path: Path) -> PreTrainedTokenizerBase:
    """The saved tokenizer as AutoTokenizer loads it."""
    if either.sha256 not in loaded:
        either.save(tmp_path)
        loaded[either.sha256] = AutoTokenizer.from_pretrained(tmp_path)
    return loaded[either.sha256]


def test_auto_tokenizer_has_the_same_special_ids(either: KeuralTokenizer, in_transformers: PreTrainedTokenizerBase) -> None:
    theirs = in_transformers
    assert len(theirs) == either.vocab_size
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.unk_token_id) == (0, 1, 3)
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|im_end|>", either.im_end_id)
    assert theirs.convert_tokens_to_ids(["<|im_start|>", "<eos>"]) == [either.im_start_id, either.eos_id]


def test_auto_tokenizer_encodes_and_decodes_the_same(either: KeuralTokenizer, in_transformers: PreTrainedTokenizerBase) -> None:
    for text in ["안녕하세요, world!", "def f():\n    return  1", " 앞뒤 ", "ㅋㅋㅋ ① 😀"]:
        ids = either.encode(text)
        assert in_transformers(text)["input_ids"] == ids, "and no bos is put first"
        assert in_transformers.decode(ids, skip_special_tokens=True) == either.decode(ids)
    spelled = "".join(MARKERS)
    assert in_transformers(spelled, split_special_tokens=True)["input_ids"] == either.encode(spelled)


@pytest.mark.parametrize("count", range(1, len(TALK) + 1))
@pytest.mark.parametrize("prompt", [False, True])
def test_template_gives_the_ids_and_mask_of_the_renderer(
    either: KeuralTokenizer, in_transformers: PreTrainedTokenizerBase, count: int, prompt: bool
) -> None:
    theirs = in_transformers.apply_chat_template(
        [message._asdict() for message in TALK[:count]],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
    )
    ours = render(either, TALK[:count], add_generation_prompt=prompt)
    assert theirs["input_ids"] == ours.ids
    assert theirs["assistant_masks"] == ours.mask


def test_template_refuses_unknown_roles(in_transformers: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="unknown role alien"):
        in_transformers.apply_chat_template([{"role": "alien", "content": "x"}])


@pytest.mark.hypothesis
def test_template_equals_renderer_on_ordinary_content(lossless: KeuralTokenizer, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("template")
    lossless.save(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1)
    roles = st.sampled_from(["user", "assistant", "tool"])
    ordinary: Callable[[str], bool] = lambda content: not content[0].isspace()  # noqa: E731

    @examples(25)
    @given(st.lists(st.builds(Message, roles, text.filter(ordinary), st.none(), text | st.just(""), st.just(True)), min_size=1))
    def check(messages: list[Message]) -> None:
        encoded = theirs.apply_chat_template(
            [message._asdict() for message in messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert (encoded["input_ids"], encoded["assistant_masks"]) == tuple(render(lossless, messages))

    check()


WIND = {
    "name": "wind",
    "description": "Wind at a place",
    "parameters": {"type": "object", "properties": {"도시": {"type": "string"}}},
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}
CALLS = [ToolCall("wind", {"도시": "목포", "unit": None}), ToolCall("clock", '{"zone":"KST"}'), ToolCall("clock", "")]


def openai(message: Message, calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
    """A message as chat interfaces have it."""
    called = [{"type": "function", "function": call._asdict()} for call in calls]
    return message._asdict() | ({"tool_calls": called} if calls else {})


@pytest.mark.parametrize("system", [[], [Message("system", "Be brief.")], [Message("system", "")]])
@pytest.mark.parametrize("said", ["", "Let me look."])
@pytest.mark.parametrize("reasoning", ["", "They ask\n  for the wind."])
def test_template_gives_the_ids_of_tools_calls_results_and_reasoning(
    either: KeuralTokenizer, in_transformers: PreTrainedTokenizerBase, system: list[Message], said: str, reasoning: str
) -> None:
    asked, result = Message("user", "목포에 바람이 부나요?"), Message("tool", '{"speed": 3}')
    called = Message("assistant", said, None, reasoning, True)
    answered = Message("assistant", "네, 초속 3미터입니다.")
    theirs = in_transformers.apply_chat_template(
        [*map(openai, system), openai(asked), openai(called, CALLS), openai(result), openai(result), openai(answered)],
        tools=[WIND, CLOCK],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        add_generation_prompt=True,
    )
    messages = [*system, asked, called._replace(content=with_calls(said, CALLS)), result, result, answered]
    ours = render(either, messages, add_generation_prompt=True, tools=[WIND, CLOCK])
    assert theirs["input_ids"] == ours.ids
    assert theirs["assistant_masks"] == ours.mask


def test_what_is_trained_follows_the_turns(lossless: KeuralTokenizer) -> None:
    turns = [
        Message("user", "asked", trained=True),
        Message("assistant", "wrong", trained=False, reasoning="hidden", reasoning_trained=True),
        Message("tool", "result"),
        Message("assistant", "right", reasoning="kept"),
        Message("assistant", "good", reasoning="learned", reasoning_trained=True),
    ]
    rendered = render(lossless, turns)
    trained = [token_id for token_id, mask in zip(rendered.ids, rendered.mask, strict=True) if mask]
    expected = "asked<|im_end|>right<|im_end|><think>\nlearned\n</think>\n\ngood<|im_end|>"
    assert lossless.decode(trained, skip_special_tokens=False) == expected


def test_content_parts_and_other_names_of_roles_are_read_by_the_template(in_transformers: PreTrainedTokenizerBase) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "s"}, {"role": "user", "content": "one\ntwo"}]
    assert in_transformers.apply_chat_template(chat) == in_transformers.apply_chat_template(plain)
    with pytest.raises(Exception, match="part of type image_url"):
        in_transformers.apply_chat_template([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}])


ARGUMENTS = st.dictionaries(
    st.text(max_size=3), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=3), max_size=3
)
SAID = st.text().map(lambda text: text.strip()).filter(lambda text: "<think>" not in text)


@given(SAID, st.lists(st.builds(ToolCall, st.text(), ARGUMENTS), max_size=3), SAID)
def test_a_generated_answer_is_taken_apart_again(said: str, calls: list[ToolCall], reasoning: str) -> None:
    whole = Message("assistant", with_calls(said, calls), reasoning=reasoning).text
    assert parse_answer(whole) == ParsedAnswer(said, tuple(calls), reasoning)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tool_call>{not json}</tool_call> end", ParsedAnswer("<tool_call>{not json}</tool_call> end")),
        ('<tool_call>\n{"name": 1}\n</tool_call>', ParsedAnswer('<tool_call>\n{"name": 1}\n</tool_call>')),
        ('<tool_call>{"name": "f"}', ParsedAnswer('<tool_call>{"name": "f"}')),
        (
            'a <tool_call>{"name":"f","arguments":{"t":"</tool_call>"}}</tool_call>',
            ParsedAnswer("a ", (ToolCall("f", {"t": CALLED}),)),
        ),
        ("<think>cut off", ParsedAnswer("", (), "cut off")),
        ("said <think>later</think>", ParsedAnswer("said <think>later</think>")),
    ],
)
def test_what_a_model_writes_is_never_lost(text: str, expected: ParsedAnswer) -> None:
    assert parse_answer(text) == expected
