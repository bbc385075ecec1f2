"""Whether answers that are computed together are those that a single-stream engine gives alone."""

import random
import threading
from collections.abc import Sequence

import torch

from keural.model import KeuralMoECausalLM
from keural.serve.batching.requests import Event, Request
from keural.serve.batching.runner import Ticket
from keural.serve.batching.scheduler import Scheduler
from keural.serve.batching.slots import Row, Slots
from keural.serve.engines.base import Engine
from keural.serve.engines.sampling_params import SamplingParams
from keural.tokenizer import Message, render_prompt

ASKED = ("the cat", "고양이는 작은", "hello", "빨간 집과 파란 새 두 마리를", "a small red house and two blue birds", "월요일")


class Forgetful:
    """Slots that keep nothing for a later prompt."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.count, self.context_length = slots.count, slots.context_length
        self.batch_tokens, self.alone_tokens = slots.batch_tokens, slots.alone_tokens
        self.step, self.on_processors = slots.step, slots.on_processors

    def cut(self, slot: int, length: int) -> int:
        """See `Slots.cut`."""
        return self._slots.cut(slot, 0)

    def copy(self, source: int, target: int, length: int) -> int:
        """See `Slots.copy`."""
        return self._slots.cut(target, 0)


def check_company(engine: Engine, slots: Slots, reuse: bool = True) -> None:
    """Assert that ten answers, greedy and seeded, of several lengths, are the same on slots, arriving at two times, as alone; with
    `reuse` of what slots hold, where prompts begin alike, or without.
    """
    slots = slots if reuse else Forgetful(slots)
    tokenizer = engine.tokenizer
    requests = [
        Request(
            render_prompt(tokenizer, [Message("user", ASKED[place % len(ASKED)])]),
            SamplingParams(0.0 if place % 3 == 0 else 0.8, 0.9, 1.1, max_new_tokens=4 + 3 * place, seed=place),
            {tokenizer.im_end_id},
        )
        for place in range(10)
    ]
    alone = [list(engine.stream(wanted.prompt_ids, wanted.sampling, set(wanted.stop_ids))) for wanted in requests]

    answers: dict[Ticket, list[int]] = {}
    done = threading.Semaphore(0)

    def deliver(events: Sequence[tuple[Ticket, Event]]) -> None:
        for ticket, event in events:
            answers.setdefault(ticket, []).extend(token.id for token in event.tokens)
            if event.end is not None:
                done.release()

    scheduler = Scheduler(slots, tokenizer.vocab_size, deliver)
    scheduler.start()
    tickets = scheduler.submit(requests[:4])
    assert done.acquire(timeout=120)
    tickets += scheduler.submit(requests[4:])
    assert all(done.acquire(timeout=120) for _ in requests[1:])
    scheduler.close()
    assert [answers[ticket] for ticket in tickets] == alone
    assert any(ticket.cached_tokens for ticket in tickets) == reuse


def check_reads(
    slots: Slots, model: KeuralMoECausalLM, ids: range, *, rounds: int, longest: int, copies: float, atol: float, rtol: float
) -> int:
    """Read, cut and copy at random on four slots; every logit is the one of reading anew. Gives how many were compared."""
    draw = random.Random(0)
    held: list[list[int]] = [[] for _ in range(4)]
    compared = 0
    for _ in range(rounds):
        for slot in range(4):
            if draw.random() < 0.15 or len(held[slot]) > longest:
                length = draw.randrange(len(held[slot]) // 2 + 1)
                assert slots.cut(slot, length) == length
                del held[slot][length:]
            other = draw.randrange(4)
            if draw.random() < copies and other != slot:
                length = draw.randrange(len(held[other]) + 1)
                assert slots.copy(other, slot, length) == length
                held[slot] = held[other][:length]
        rows = []
        for slot in range(4):
            if number := draw.choice([0, 1, 1, 1, 1, 1, 5, 17]):
                new = draw.choices(ids, k=number)
                rows.append(Row(slot, new, len(held[slot]), number == 1 or draw.random() < 0.5))
                held[slot] += new
        if not rows:
            continue
        for row, logits in zip([row for row in rows if row.wants_logits], slots.step(rows), strict=True):
            with torch.inference_mode():
                anew = model(torch.tensor([held[row.slot]])).logits[0, -1]
            torch.testing.assert_close(torch.as_tensor(logits), anew, atol=atol, rtol=rtol)
            compared += 1
    return compared
