"""ChatML by ids: what is trained, that nothing can be injected, and that transformers' template gives the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from keural.errors import UserError
from keural.tokenizer import KeuralTokenizer, Message, render, render_prompt

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


def test_part_of_a_conversation_is_a_prefix_of_the_whole(either: KeuralTokenizer) -> None:
    @settings(max_examples=100, deadline=None)
    @given(CONVERSATIONS)
    def check(messages: list[Message]) -> None:
        whole = render(either, messages)
        for count in range(len(messages) + 1):
            part = render(either, messages[:count])
            assert whole.ids[: len(part.ids)] == part.ids
            assert whole.mask[: len(part.mask)] == part.mask

    check()


def test_content_never_yields_control_ids(either: KeuralTokenizer) -> None:
    @settings(max_examples=200, deadline=None)
    @given(CONVERSATIONS)
    def check(messages: list[Message]) -> None:
        ids = render(either, messages).ids
        assert ids.count(either.im_start_id) == ids.count(either.im_end_id) == len(messages)
        assert not {either.pad_id, either.bos_id, either.eos_id, either.unk_id} & set(ids)

    check()


def test_lossless_rendering_keeps_content_that_spells_markers(lossless: KeuralTokenizer) -> None:
    @settings(max_examples=100, deadline=None)
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


def test_template_equals_renderer_on_ordinary_content(lossless: KeuralTokenizer, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("template")
    lossless.save(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1)
    ordinary: Callable[[str], bool] = lambda content: not content[0].isspace()  # noqa: E731

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.builds(Message, st.sampled_from(["user", "assistant", "tool"]), text.filter(ordinary), st.none()), min_size=1))
    def check(messages: list[Message]) -> None:
        encoded = theirs.apply_chat_template(
            [message._asdict() for message in messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert (encoded["input_ids"], encoded["assistant_masks"]) == tuple(render(lossless, messages))

    check()
