"""The llama.cpp engine: answers equal to those of transformers on the same weights, how they end, the cache, and refusals."""

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra llama)")

from keural.convert.export import ExportOptions, export
from keural.errors import UserError
from keural.recipe import TokenizerSpec
from keural.serve.engines.llama_cpp import LlamaCppEngine, physical_cores
from keural.serve.engines.registry import open_engine
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.engines.transformers import TransformersEngine
from keural.tokenizer import KeuralTokenizer, Message, render_prompt
from keural.tokenizer.train import train_tokenizer
from tests.conftest import TEXTS
from tests.helpers.streams import run

Keural = Callable[..., tuple[int, str, str]]

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=30)


@pytest.fixture(scope="module")
def gguf(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 export. Do not change it; copy it."""
    return export(model_dir, tmp_path_factory.mktemp("export") / "gguf", "gguf", ExportOptions(quantize="f32"))


@pytest.fixture(scope="module")
def engine(gguf: Path) -> LlamaCppEngine:
    return LlamaCppEngine(gguf, threads=1)


@pytest.fixture
def prompt(tokenizer: KeuralTokenizer) -> list[int]:
    return render_prompt(tokenizer, [Message("user", "the cat 고양이는")])


def conversation(shared: int, tail: list[int]) -> list[int]:
    return [*range(260, 260 + shared), *tail]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=1, max_new_tokens=30)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [3, 40, 100, 140])
def test_answers_equal_those_of_transformers(
    engine: LlamaCppEngine, model_dir: Path, sampling: SamplingParams, length: int
) -> None:
    reference = TransformersEngine(model_dir, device="cpu")

    assert run(engine.stream(conversation(length, []), sampling, set())) == run(
        reference.stream(conversation(length, []), sampling, set())
    )


def test_the_directory_is_run_as_the_file_is(gguf: Path, engine: LlamaCppEngine, prompt: list[int]) -> None:
    opened = open_engine(gguf.parent, threads=1)

    assert isinstance(opened, LlamaCppEngine)
    assert opened.context_length == engine.context_length == 160
    assert run(opened.stream(prompt, GREEDY, set())) == run(engine.stream(prompt, GREEDY, set()))


def test_the_command_writes_the_same_with_both_engines(keural: Keural, gguf: Path, model_dir: Path) -> None:
    options = ["--prompt", "the cat", "--seed", "3", "--max-new-tokens", "20", "--threads", "1"]

    code, text, _ = keural("generate", gguf.parent, "--engine", "llama.cpp", *options)

    assert (code, text) == keural("generate", model_dir, "--engine", "transformers", *options)[:2]
    assert code == 0


def test_stop_token_ends_the_answer_and_is_not_yielded(engine: LlamaCppEngine, prompt: list[int]) -> None:
    free, finish = run(engine.stream(prompt, GREEDY, set()))
    stop = free[5]

    assert (len(free), finish) == (30, "length")
    assert run(engine.stream(prompt, GREEDY, {stop})) == (free[: free.index(stop)], "stop")


def test_answer_ends_where_the_context_is_full(engine: LlamaCppEngine) -> None:
    ids, finish = run(engine.stream([5] * 155, GREEDY, set()))

    assert (len(ids), finish) == (5, "context")


def test_prompt_without_room_or_words_is_refused(engine: LlamaCppEngine) -> None:
    with pytest.raises(UserError, match="has 160 tokens and the model's context is 160"):
        next(engine.stream([5] * 160, GREEDY, set()))
    with pytest.raises(UserError, match="empty"):
        next(engine.stream([], GREEDY, set()))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (conversation(30, []), conversation(30, [7, 8, 9])),
        (conversation(5, []), conversation(3, [7, 8])),
        (conversation(100, []), conversation(95, [11])),
        (conversation(100, []), conversation(20, [11])),
        (conversation(20, []), conversation(20, [])),
        (conversation(20, []), conversation(4, [])),
        (conversation(3, [9]), conversation(0, [12, 13])),
    ],
    ids=["grows", "early", "late, within the window", "beyond the window", "same again", "shorter", "nothing in common"],
)
def test_a_warm_cache_answers_like_a_fresh_engine(gguf: Path, first: list[int], second: list[int]) -> None:
    warm, fresh = LlamaCppEngine(gguf, threads=1), LlamaCppEngine(gguf, threads=1)
    run(warm.stream(first, SamplingParams(temperature=0.0, max_new_tokens=4), set()))

    assert run(warm.stream(second, GREEDY, set())) == run(fresh.stream(second, GREEDY, set()))


def test_next_turn_reads_only_what_is_new(engine: LlamaCppEngine, prompt: list[int]) -> None:
    answer, _ = run(engine.stream(prompt, SamplingParams(temperature=0.0, max_new_tokens=6), set()))

    assert engine._reuse([*prompt, *answer, 7, 8]) == [answer[-1], 7, 8]


def test_a_cache_cut_far_behind_the_window_is_kept(engine: LlamaCppEngine) -> None:
    run(engine.stream(conversation(100, []), GREEDY, set()))

    assert engine._reuse(conversation(20, [11])) == [11]


def test_closing_cancels_and_the_engine_goes_on(engine: LlamaCppEngine, prompt: list[int]) -> None:
    expected, _ = run(engine.stream(prompt, GREEDY, set()))
    stream = engine.stream(prompt, GREEDY, set())
    assert list(islice(stream, 3)) == expected[:3]
    stream.close()

    assert list(stream) == []
    assert run(engine.stream(prompt, GREEDY, set()))[0] == expected


@pytest.mark.parametrize("before", [True, False], ids=["before the read", "after the read"])
def test_interrupt_around_a_read_does_not_spoil_the_cache(
    engine: LlamaCppEngine, prompt: list[int], monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    expected, _ = run(engine.stream(prompt, GREEDY, set()))
    decode: Callable[[list[int]], None] = engine._decode
    stream = engine.stream([*prompt, *expected[:4], 9], GREEDY, set())
    next(stream)

    def interrupted(ids: list[int]) -> None:
        if not before:
            decode(ids)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)

    assert run(engine.stream(prompt, GREEDY, set()))[0] == expected


def test_threads_are_physical_cores_by_default() -> None:
    assert physical_cores() >= 1


# Refusals


@pytest.fixture
def copy(gguf: Path, tmp_path: Path) -> Path:
    """The exported file in a directory of its own that may be damaged: without a record, nothing is compared."""
    directory = tmp_path / "copy"
    shutil.copytree(gguf.parent, directory)
    (directory / "keural.json").unlink()
    return directory / gguf.name


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as refused:
        LlamaCppEngine(file, threads=1)
    return str(refused.value)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(copy: Path, kept: float) -> None:
    copy.write_bytes(copy.read_bytes()[: int(copy.stat().st_size * kept)])

    assert refusal(copy).startswith(f"{copy}: llama.cpp cannot load it (")
    assert "copy or export it again" in refusal(copy)


def test_a_file_that_is_no_gguf_is_refused(copy: Path) -> None:
    copy.write_bytes(b"PK\x03\x04" + bytes(100))

    assert refusal(copy) == f"{copy}: is not a GGUF file; copy or export it again"


@pytest.mark.parametrize("changed", ["weights", "tokenizer"])
def test_a_changed_file_is_refused_by_its_checksum(gguf: Path, tmp_path: Path, changed: str) -> None:
    directory = tmp_path / "changed"
    shutil.copytree(gguf.parent, directory)
    file = directory / (gguf.name if changed == "weights" else "tokenizer.model")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")

    assert refusal(directory / gguf.name).startswith(f"{file}: does not match its checksum in keural.json")


def test_another_architecture_is_refused(copy: Path) -> None:
    copy.write_bytes(copy.read_bytes().replace(b"granite_swa", b"granite_swx"))

    assert "unknown model architecture: 'granite_swx'" in refusal(copy)


def test_a_tokenizer_of_another_size_is_refused(copy: Path, published_tokenizer_file: Path) -> None:
    shutil.copy(published_tokenizer_file, copy.parent / "tokenizer.model")

    assert "the tokenizer has 131074 ids and" in refusal(copy)


def test_another_tokenizer_of_the_same_size_is_refused(copy: Path, tmp_path: Path) -> None:
    """Where no record says which tokenizer belongs there, the pieces in the file do."""
    spec = TokenizerSpec.model_validate({"vocab_size": 400, "sources": [{"name": "words", "adapter": "text"}]})
    train_tokenizer((text[::-1] for text in TEXTS), spec, tmp_path / "other", seed=0)
    shutil.copy(tmp_path / "other" / "tokenizer.model", copy.parent / "tokenizer.model")

    assert "the tokenizer is not that of" in refusal(copy)


def test_a_missing_tokenizer_is_refused(copy: Path) -> None:
    (copy.parent / "tokenizer.model").unlink()

    assert "tokenizer.model: no such file" in refusal(copy)
