"""Tokens that come quicker than anybody reads go together; first ones, ends and slow ones wait for nothing."""

import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from keural.serve.batching import mail as room
from keural.serve.batching import scheduler as scheduler_room
from keural.serve.batching.mail import Mail
from keural.serve.batching.requests import Chosen, Event, Request
from keural.serve.batching.runner import Ticket
from keural.serve.batching.scheduler import Scheduler
from keural.serve.batching.slots import Row
from keural.serve.engines.sampling_params import SamplingParams
from tests.helpers.fake_slots import VOCAB, FakeSlots
from tests.helpers.serving import PATIENCE

FIRST, SECOND = (Ticket(Request([1], SamplingParams()), number, 0.0) for number in range(2))


class Steps:
    """A mail, steps that take as long as is said, and how many tokens of an answer each delivery had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(room.time, "perf_counter", lambda: self.now)
        self.events: list[tuple[Ticket, Event]] = []
        self.sizes: list[int] = []
        self.mail = Mail(self._take, 0.020)

    def _take(self, events: Sequence[tuple[Ticket, Event]]) -> None:
        self.events += events
        self.sizes.append(sum(len(event.tokens) for _, event in events))

    def step(self, seconds: float) -> None:
        self.now += seconds
        self.mail.add(FIRST, Chosen(len(self.events)))
        if self.mail.is_due():
            self.mail.hand_on()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def test_quick_tokens_go_as_seldom_as_they_may_and_none_is_later_than_that(steps: Steps) -> None:
    for _ in range(17):
        steps.step(0.0041)
    assert steps.sizes == [1, *[4] * 4], "with the fifth one the first of them would be late"


@pytest.mark.parametrize("seconds", [0.011, 0.019, 0.3])
def test_of_slower_steps_every_token_goes_by_itself(steps: Steps, seconds: float) -> None:
    for _ in range(6):
        steps.step(seconds)
    assert steps.sizes == [1] * 6


def test_an_end_takes_along_what_came_of_its_answer_and_all_that_waits(steps: Steps) -> None:
    steps.step(0.004)
    steps.step(0.004)
    steps.mail.add(SECOND, Chosen(7))
    steps.mail.end(SECOND, "length")
    assert steps.mail.is_due()
    steps.mail.hand_on()
    steps.mail.hand_on()

    assert steps.events[1:] == [(SECOND, Event([Chosen(7)], "length")), (FIRST, Event([Chosen(1)]))]
    assert steps.sizes == [1, 2], "nothing is delivered where there is nothing"


def test_nothing_waits_for_a_prompt_to_be_read_and_a_first_token_for_nothing() -> None:
    """The steps in which each token had been chosen, and the one in whose course it was delivered."""
    arrived: dict[int, list[int]] = {0: [], 1: []}
    slots = FakeSlots(2, context_length=400, batch_tokens=30, before_step=lambda rows: long.append(_reads(rows)))
    long: list[bool] = []

    def deliver(events: Sequence[tuple[Ticket, Event]]) -> None:
        for ticket, event in events:
            arrived[ticket.number] += [len(long)] * len(event.tokens)
            if ticket.number == 0 and len(arrived[0]) == 1:
                scheduler.submit([Request([2] * 90, SamplingParams(max_new_tokens=3, seed=0))])

    scheduler = Scheduler(slots, VOCAB, deliver, together=60.0)
    scheduler.submit([Request([1], SamplingParams(max_new_tokens=40, seed=0))])
    scheduler.start()
    end = time.monotonic() + PATIENCE
    while len(arrived[0]) < 40 or len(arrived[1]) < 3:
        assert time.monotonic() < end
        time.sleep(0.001)
    scheduler.close()

    first_of_second = arrived[1][0]
    assert arrived[0][0] == 1, "the first token goes at once"
    assert long[first_of_second - 1], "and so does the other one's, after the part of its prompt that it follows"
    before = [step for step in range(1, first_of_second) if long[step]]
    assert before, "the prompt was read in parts, beside the answer under way"
    assert set(before) <= set(arrived[0]), "before each part, what was there was handed on"


@pytest.mark.parametrize("on_processors", [True, False])
def test_a_step_that_takes_all_processors_gives_way_to_a_first_token_alone(
    on_processors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    clock = SimpleNamespace(monotonic=time.monotonic, perf_counter=time.perf_counter, sleep=done.append)
    monkeypatch.setattr(scheduler_room, "time", clock)
    slots = FakeSlots(1, on_processors=on_processors, before_step=lambda _: done.append("step"))
    scheduler = Scheduler(slots, VOCAB, lambda events: done.append(len(events[0][1].tokens)), together=0)
    scheduler.submit([Request([1], SamplingParams(max_new_tokens=3, seed=0))])
    scheduler.start()
    end = time.monotonic() + PATIENCE
    while done.count(1) < 3:
        assert time.monotonic() < end
        time.sleep(0.001)
    scheduler.close()

    waited = [scheduler_room.GIVE_WAY] if on_processors else []
    assert done[: 6 + len(waited)] == ["step", 1, *waited, "step", 1, "step", 1]


def _reads(rows: Sequence[Row]) -> bool:
    return any(len(row.ids) > 1 for row in rows)
