"""llama.cpp's sequences as slots: answers equal to those of the single-stream engine, in any company."""

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra llama)")

from keural.convert.export import ExportOptions, export
from keural.model import KeuralMoECausalLM
from keural.serve.batching.llama_slots import LlamaSlots
from keural.serve.batching.slots import Row
from keural.serve.engines.llama_cpp import LlamaCppEngine
from tests.helpers.company import check_company


@pytest.fixture(scope="module")
def gguf(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model_dir, tmp_path_factory.mktemp("export") / "gguf", "gguf", ExportOptions(quantize="f32"))


def test_any_order_of_reading_cutting_and_copying_gives_the_logits_of_reading_anew(gguf: Path, model: KeuralMoECausalLM) -> None:
    draw = random.Random(0)
    slots = LlamaSlots(gguf, 4, threads=1)
    longest = slots.context_length - 40
    held: list[list[int]] = [[] for _ in range(4)]
    compared = 0
    for _ in range(60):
        for slot in range(4):
            if draw.random() < 0.15 or len(held[slot]) > longest:
                length = draw.randrange(len(held[slot]) // 2 + 1)
                assert slots.cut(slot, length) == length
                del held[slot][length:]
            other = draw.randrange(4)
            if draw.random() < 0.1 and other != slot:
                length = draw.randrange(len(held[other]) + 1)
                assert slots.copy(other, slot, length) == length
                held[slot] = held[other][:length]
        rows = []
        for slot in range(4):
            if number := draw.choice([0, 1, 1, 1, 1, 1, 5, 17]):
                ids = [draw.randrange(260, 300) for _ in range(number)]
                rows.append(Row(slot, ids, len(held[slot]), number == 1 or draw.random() < 0.5))
                held[slot] += ids
        if not rows:
            continue
        for row, logits in zip([row for row in rows if row.wants_logits], slots.step(rows), strict=True):
            with torch.inference_mode():
                exact = model(torch.tensor([held[row.slot]])).logits[0, -1]
            torch.testing.assert_close(logits, exact, atol=1e-4, rtol=1e-3)
            compared += 1
    assert compared > 100


def test_what_a_slot_cannot_do_is_refused(gguf: Path) -> None:
    slots = LlamaSlots(gguf, 1, threads=1)
    with pytest.raises(ValueError, match="holds 0 tokens, not 3"):
        slots.step([Row(0, [260], 3, True)])
    with pytest.raises(ValueError, match="tokens in a step"):
        slots.step([Row(0, [260] * (slots.batch_tokens + 1), 0, True)])


@pytest.mark.parametrize("count", [1, 4, 8])
def test_together_with_others_an_answer_is_the_one_of_the_single_stream_engine(gguf: Path, count: int) -> None:
    check_company(LlamaCppEngine(gguf, threads=1), LlamaSlots(gguf, count, threads=1))
