"""llama.cpp's sequences as slots: answers equal to those of the single-stream engine, in any company."""

from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra llama)")

from keural.convert.export import ExportOptions, export
from keural.model import KeuralMoECausalLM
from keural.serve.batching.llama_slots import LlamaSlots
from keural.serve.batching.slots import Row
from keural.serve.engines.llama_cpp import LlamaCppEngine
from tests.helpers.company import check_company, check_reads


@pytest.fixture(scope="module")
def gguf(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model_dir, tmp_path_factory.mktemp("export") / "gguf", "gguf", ExportOptions(quantize="f32"))


def test_any_order_of_reading_cutting_and_copying_gives_the_logits_of_reading_anew(gguf: Path, model: KeuralMoECausalLM) -> None:
    slots = LlamaSlots(gguf, 4, threads=1)
    longest = slots.context_length - 40
    assert check_reads(slots, model, range(260, 300), rounds=60, longest=longest, copies=0.1, atol=1e-4, rtol=1e-3) > 100


def test_what_a_slot_cannot_do_is_refused(gguf: Path) -> None:
    slots = LlamaSlots(gguf, 1, threads=1)
    with pytest.raises(ValueError, match="holds 0 tokens, not 3"):
        slots.step([Row(0, [260], 3, True)])
    with pytest.raises(ValueError, match="tokens in a step"):
        slots.step([Row(0, [260] * (slots.alone_tokens + 1), 0, True)])


@pytest.mark.parametrize(("count", "reuse"), [(1, True), (4, True), (8, True), (4, False)])
def test_together_with_others_an_answer_is_the_one_of_the_single_stream_engine(gguf: Path, count: int, reuse: bool) -> None:
    check_company(LlamaCppEngine(gguf, threads=1), LlamaSlots(gguf, count, threads=1), reuse)
