"""The measures against naive loops in float64 and against `xz` itself."""

import copy
import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keural import microworld
from keural.errors import UserError
from keural.evaluate import toy_world
from keural.evaluate.measures import (
    bits_per_byte,
    exact_match,
    is_correct,
    polite_rate,
)
from keural.evaluate.packers import packed_bits_per_byte
from keural.evaluate.results.records import ItemResult
from keural.evaluate.windows import windows
from keural.model import KeuralMoECausalLM
from keural.tokenizer import KeuralTokenizer, Message, render_prompt

TEXTS = ["the cat sees two blue birds 고양이는 정원에서 봅니다 " * 4, "", "안녕하세요", "red house\n\tin the garden"]


@dataclass(frozen=True)
class Question:
    task: str
    language: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Preference:
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


ITEMS = [
    Question("arithmetic", "en", ("eleven", "11")),
    Question("arithmetic", "ko", ("열하나입니다",)),
    Question("facts", "ko", ("파란 새",)),
    Question("facts", "ko", ("정원",)),
]


def test_exact_match_counts_by_task_and_language() -> None:
    result = exact_match(["11", "열하나", "파란 새", "집"], ITEMS)

    assert result["accuracy"] == 0.5
    assert result["n"] == 4
    assert result["stderr"] == pytest.approx(0.25)
    assert result["by_task"] == {"arithmetic": 0.5, "facts": 0.5}
    assert result["by_language"] == {"en": 1.0, "ko": pytest.approx(1 / 3)}
    assert result["by_task_and_language"] == {"arithmetic": {"en": 1.0, "ko": 0.0}, "facts": {"ko": 0.5}}


@pytest.mark.parametrize(
    ("answer", "right"),
    [("eleven", True), (" eleven\n", True), ("11", True), ("Eleven", False), ("eleven.", False), ("elev en", False), ("", False)],
)
def test_only_whitespace_is_forgiven(answer: str, right: bool) -> None:
    assert is_correct(answer, ITEMS[0]) is right


def test_inner_whitespace_counts_as_one_space() -> None:
    assert is_correct("파란 \n 새", ITEMS[2])


def test_each_item_needs_an_answer() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact_match(["11"], ITEMS)


def test_measure_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no items"):
        exact_match([], [])
    with pytest.raises(UserError, match="no answers"):
        polite_rate([], bool)
    with pytest.raises(UserError, match="no text"):
        packed_bits_per_byte(["", ""])


def test_polite_rate_is_a_share() -> None:
    assert polite_rate(["갑니다", "간다", "좋습니다", "입니다"], lambda answer: answer.endswith("니다")) == 0.75


@pytest.fixture(scope="module")
def exact(model: KeuralMoECausalLM) -> KeuralMoECausalLM:
    """The model in float64, for oracles."""
    doubled = copy.deepcopy(model).double()
    doubled.set_experts_implementation("eager")  # grouped matrix products know no float64
    return doubled


def naive_logprob(model: KeuralMoECausalLM, context: list[int], token: int) -> float:
    with torch.no_grad():
        return float(model(torch.tensor([context])).logits[0, -1].log_softmax(-1)[token])


def naive_answer(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, prompt: tuple[Message, ...], answer: str) -> float:
    ids, total = render_prompt(tokenizer, prompt), 0.0
    for token in [*tokenizer.encode(answer), tokenizer.im_end_id]:
        total += naive_logprob(model, ids, token)
        ids.append(token)
    return total


PAIRS = [
    Preference((Message("user", "the cat"),), "열하나", "blue birds in the garden"),
    Preference((Message("user", "the cat"),), "blue birds in the garden", "열하나"),
    Preference((Message("system", "안녕"), Message("user", "집과")), "red house", "red cat"),
]


def preferred(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, pairs: Sequence[Preference]) -> list[ItemResult]:
    """What the toy world finds of pairs in a chat."""
    items = tuple(microworld.Pair(pair.prompt, pair.chosen, pair.rejected, "ko") for pair in pairs)
    bench = SimpleNamespace(model=lambda name: model, tokenizer=tokenizer)
    return toy_world._choose(bench, "m", toy_world.ToyTask("preferences", "ko", items), in_chat=True, longest=0)  # type: ignore[arg-type]


def test_preference_margins_are_differences_of_summed_logprobs(
    model: KeuralMoECausalLM, exact: KeuralMoECausalLM, tokenizer: KeuralTokenizer
) -> None:
    found = preferred(model, tokenizer, PAIRS)
    margins = [first - second for first, second in (item.logprobs or () for item in found)]

    for margin, pair in zip(margins, PAIRS, strict=True):
        chosen, rejected = (naive_answer(exact, tokenizer, pair.prompt, answer) for answer in (pair.chosen, pair.rejected))
        assert margin == pytest.approx(chosen - rejected, rel=1e-4)
    assert sum(item.score for item in found) / 3 == sum(margin > 0 for margin in margins) / 3


def test_preferring_an_answer_to_itself_counts_as_wrong(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    same = [Preference((Message("user", "cat"),), "yes", "yes")]

    assert [item.score for item in preferred(model, tokenizer, same)] == [0.0]


@pytest.mark.parametrize(("length", "overlap"), [(160, 0), (11, 0), (11, 4), (2, 1), (1, 0)])
def test_bits_per_byte_equals_a_naive_loop(
    model: KeuralMoECausalLM, exact: KeuralMoECausalLM, tokenizer: KeuralTokenizer, length: int, overlap: int
) -> None:
    result = bits_per_byte(model, tokenizer, TEXTS, length, overlap)

    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = [1, *tokenizer.encode(text), 2]
        for position in range(1, len(ids)):
            # Windows advance by length - overlap, the first one has nothing to overlap with.
            start = 0 if position <= length else ((position - 1 - length) // (length - overlap) + 1) * (length - overlap)
            nats -= naive_logprob(exact, ids[start:position], ids[position])
            tokens += 1
    size = len("".join(TEXTS).encode())
    assert result["bytes"] == size
    assert result["tokens"] == tokens
    assert result["bits"] == pytest.approx(nats / math.log(2), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@given(st.integers(0, 70), st.integers(1, 20), st.data())
def test_windows_predict_each_token_once(count: int, length: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, length - 1))
    ids = list(range(count))

    found = list(windows(count, length, overlap))

    assert [token for _, first, stop in found for token in ids[first:stop]] == ids[1:]
    assert all(stop - start <= length + 1 for start, _, stop in found)
    assert all(first - 1 - start == overlap for start, first, _ in found[1:] if start > 0)


def test_uniform_model_needs_log2_of_the_vocabulary_per_token(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    uniform = copy.deepcopy(model)
    with torch.no_grad():
        uniform.model.norm.weight.zero_()

    result = bits_per_byte(uniform, tokenizer, TEXTS, 50)

    assert result["bits"] == pytest.approx(result["tokens"] * math.log2(tokenizer.vocab_size), rel=1e-6)


def test_bits_per_byte_refuses_what_cannot_be_measured(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
    with pytest.raises(UserError, match="no text"):
        bits_per_byte(model, tokenizer, [""], 10)
    with pytest.raises(UserError, match="do not fit"):
        bits_per_byte(model, tokenizer, ["text"], 161)
    with pytest.raises(UserError, match="do not fit"):
        bits_per_byte(model, tokenizer, ["text"], 10, overlap=10)


@pytest.mark.skipif(shutil.which("xz") is None, reason="xz is not installed")
def test_xz_equals_the_command() -> None:
    texts = [f"line {number} of the garden 정원 {number * 7919}" for number in range(300)]
    data = "".join(texts).encode()

    packed = subprocess.run(["xz", "-9", "--threads=1", "--stdout"], input=data, capture_output=True, check=True).stdout
    # The command adds a 64-bit checksum as Python's lzma does by default; both write one block.
    assert packed_bits_per_byte(texts)["xz_9"] == pytest.approx(8 * len(packed) / len(data), abs=8 * 16 / len(data))


def test_zstd_equals_another_library_s() -> None:
    library = pytest.importorskip("zstandard")
    texts = [text * 30 for text in TEXTS]
    data = "".join(texts).encode()
    expected = 8 * len(library.ZstdCompressor(level=19).compress(data)) / len(data)
    assert packed_bits_per_byte(texts)["zstd_19"] == pytest.approx(expected, abs=8 * 16 / len(data))
