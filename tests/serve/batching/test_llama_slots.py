"""llama.cpp's sequences as slots: answers equal to those of the single-stream engine, in any company."""

import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra llama)")

from keural.convert.export import ExportOptions, export
from keural.model import KeuralMoECausalLM
from keural.serve.batching.llama_slots import LlamaSlots
from keural.serve.batching.requests import Event, Request
from keural.serve.batching.scheduler import Scheduler, Ticket
from keural.serve.batching.slots import Row
from keural.serve.engines.llama_cpp import LlamaCppEngine
from keural.serve.engines.sampling_params import SamplingParams
from keural.tokenizer import KeuralTokenizer, Message, render_prompt


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
def test_together_with_others_an_answer_is_the_one_of_the_single_stream_engine(
    gguf: Path, tokenizer: KeuralTokenizer, count: int
) -> None:
    engine = LlamaCppEngine(gguf, threads=1)
    words = ["the cat", "고양이는 작은", "hello", "빨간 집과 파란 새 두 마리를", "a small red house and two blue birds", "월요일"]
    requests = [
        Request(
            render_prompt(tokenizer, [Message("user", words[place % len(words)])]),
            SamplingParams(0.0 if place % 3 == 0 else 0.8, 0.9, 1.1, max_new_tokens=4 + 3 * place, seed=place),
            {tokenizer.im_end_id},
        )
        for place in range(10)
    ]
    alone = [list(engine.stream(wanted.prompt_ids, wanted.sampling, wanted.stop_ids)) for wanted in requests]

    answers: dict[Ticket, list[int]] = {}
    done = threading.Semaphore(0)

    def deliver(events: Sequence[tuple[Ticket, Event]]) -> None:
        for ticket, event in events:
            answers.setdefault(ticket, []).extend(token.id for token in event.tokens)
            if event.end is not None:
                done.release()

    scheduler = Scheduler(LlamaSlots(gguf, count, threads=1), tokenizer.vocab_size, deliver)
    scheduler.start()
    tickets = scheduler.submit(requests[:4])
    assert done.acquire(timeout=60)
    tickets += scheduler.submit(requests[4:])
    assert all(done.acquire(timeout=60) for _ in requests[1:])
    scheduler.close()
    assert [answers[ticket] for ticket in tickets] == alone
