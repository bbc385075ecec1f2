"""Many requests at once give what each gives alone; each ends exactly once, in the order of arrival, and leaves its slot."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keural.errors import UserError
from keural.serve.batching import runner
from keural.serve.batching import scheduler as scheduler_room
from keural.serve.batching.requests import Event, QueueFull, Request
from keural.serve.batching.runner import Ticket
from keural.serve.batching.scheduler import FAILURES_IN_A_ROW, Scheduler
from keural.serve.batching.slots import Row
from keural.serve.engines.decoding import decode
from keural.serve.engines.sampling_params import SamplingParams
from tests.helpers.examples import examples
from tests.helpers.fake_slots import VOCAB, FakeSlots, logits_after
from tests.helpers.held_server import LaterClock
from tests.helpers.serving import PATIENCE
from tests.helpers.streams import run


class Desk:
    """Who asks: keeps every event of every ticket, and can wait for the ends."""

    def __init__(self) -> None:
        self.events: dict[Ticket, list[Event]] = defaultdict(list)
        self.order: list[Ticket] = []
        self.changed = threading.Condition()

    def deliver(self, events: Sequence[tuple[Ticket, Event]]) -> None:
        with self.changed:
            for ticket, event in events:
                self.events[ticket].append(event)
                if event.end is not None:
                    self.order.append(ticket)
            self.changed.notify_all()

    def wait(self, tickets: Sequence[Ticket]) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: all(ticket in self.order for ticket in tickets), PATIENCE)
        assert done, "some requests never ended"

    def wait_for_tokens(self, ticket: Ticket, number: int = 1) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.answer(ticket)) >= number, PATIENCE)

    def answer(self, ticket: Ticket) -> list[int]:
        return [token.id for event in self.events[ticket] for token in event.tokens]

    def end(self, ticket: Ticket) -> str:
        (end,) = [event.end for event in self.events[ticket] if event.end is not None]
        assert self.events[ticket][-1].end == end, "nothing comes after the end"
        return str(end)


class Gate:
    """Steps of a network, of which those from `after` on wait until it is opened."""

    def __init__(self, after: int) -> None:
        self.open, self._left = threading.Event(), iter(range(after - 1))

    def __call__(self, _: Sequence[Row]) -> None:
        if next(self._left, None) is None:
            assert self.open.wait(PATIENCE)


@contextmanager
def running(slots: FakeSlots, **options: Any) -> Iterator[tuple[Scheduler, Desk]]:
    desk = Desk()
    scheduler = Scheduler(slots, VOCAB, desk.deliver, **options)
    scheduler.start()
    try:
        yield scheduler, desk
    finally:
        scheduler.close()
        assert not scheduler._thread.is_alive()


def alone(request: Request, context_length: int = 40) -> tuple[list[int], str]:
    """What the single-stream loop of every engine gives."""
    held: list[int] = []

    def read(ids: list[int]) -> torch.Tensor:
        held.extend(ids)
        return logits_after(held)

    return run(decode(read, list(request.prompt_ids), request.prompt_ids, request.sampling, request.stop_ids, context_length))


def request(prompt: Sequence[int], tokens: int = 5, seed: int = 0, temperature: float = 1.0, **changes: Any) -> Request:
    return Request(prompt, SamplingParams(temperature, 0.9, 1.1, max_new_tokens=tokens, seed=seed), **changes)


PROMPTS = st.lists(st.integers(0, 3), min_size=1, max_size=39)


@examples(10)
@given(
    asked=st.lists(
        st.tuples(PROMPTS, st.integers(1, 12), st.integers(0, 5), st.sampled_from([0.0, 0.7]), st.integers(0, 4)),
        min_size=1,
        max_size=12,
    ),
    count=st.integers(1, 4),
    batch_tokens=st.integers(1, 12),
    keeps=st.sampled_from([lambda length: length, lambda length: 0, lambda length: length // 2]),
)
def test_together_as_alone_and_no_slot_is_lost(asked: list[Any], count: int, batch_tokens: int, keeps: Any) -> None:
    slots = FakeSlots(count, batch_tokens=batch_tokens, keeps=keeps)
    requests = [request(*args, stop_ids={7}) for *args, _ in asked]
    with running(slots, max_waiting=100) as (scheduler, desk):
        tickets: list[Ticket] = []
        for wanted, (*_, pause) in zip(requests, asked, strict=True):
            tickets += scheduler.submit([wanted])
            time.sleep(pause * 1e-4)
        desk.wait(tickets)
        for ticket, wanted in zip(tickets, requests, strict=True):
            assert (desk.answer(ticket), desk.end(ticket)) == alone(wanted)
        assert not scheduler._active
        assert [len(held) for held in scheduler._held] == [len(held) for held in slots.held]
        assert sum(scheduler.stats.finished.values()) == len(requests)
        started = [ticket.started for ticket in tickets]
        assert started == sorted(started), "first come, first served"


@examples(10)
@given(
    asked=st.lists(st.tuples(PROMPTS, st.integers(1, 30), st.integers(0, 3), st.booleans()), min_size=1, max_size=10),
    broken=st.sets(st.integers(0, 30), max_size=2),
)
def test_whatever_is_cancelled_late_or_fails_ends_once_and_touches_nobody_else(asked: list[Any], broken: set[int]) -> None:
    steps = iter(range(10_000))

    def fail(_: Sequence[Row]) -> None:
        if next(steps) in broken:
            raise RuntimeError("no memory")

    slots = FakeSlots(2, pause=1e-4, before_step=fail)
    with running(slots, max_waiting=100) as (scheduler, desk):
        requests = [request(prompt, tokens, seconds=0.0005 if late else None) for prompt, tokens, _, late in asked]
        tickets = scheduler.submit(requests)
        for ticket, (*_, pause, _) in zip(tickets, asked, strict=True):
            if pause == 3:
                scheduler.cancel(ticket)
            time.sleep(pause * 1e-4)
        desk.wait(tickets)
        for ticket, wanted in zip(tickets, requests, strict=True):
            ids, end = alone(wanted)
            assert desk.end(ticket) in {end, "cancelled", "deadline", "error"}
            if desk.end(ticket) == end:
                assert desk.answer(ticket) == ids
            else:
                assert desk.answer(ticket) == ids[: len(desk.answer(ticket))]
        later = request([1, 2, 3])
        tickets = scheduler.submit([later]) if scheduler.broken is None else []
        desk.wait(tickets)
        assert all(desk.end(ticket) == "error" or (desk.answer(ticket), desk.end(ticket)) == alone(later) for ticket in tickets)
        assert not scheduler._active


SHARED = [[1, 2, 3] * 10, [1, 2, 3] * 8 + [5] * 9, [4] * 25]
"""Prompts that begin alike for longer than a request waits for another one to read."""


@examples(10)
@given(
    asked=st.lists(
        st.tuples(
            st.integers(0, 2),  # which prompt, and how much of it
            st.integers(1, 37),
            st.integers(1, 4),  # answers to it
            st.integers(1, 15),  # their length
            st.sampled_from([None, None, 0, 1, 4]),  # given up after so many tokens of the first one
            st.sampled_from([None, None, 0.0, 0.002]),  # time that they have
        ),
        min_size=1,
        max_size=8,
    ),
    count=st.integers(1, 4),
    batch_tokens=st.integers(2, 20),
)
def test_answers_that_share_beginnings_are_given_up_at_any_moment(asked: list[Any], count: int, batch_tokens: int) -> None:
    slots = FakeSlots(count, context_length=60, batch_tokens=batch_tokens, pause=5e-5)
    with running(slots, max_waiting=100) as (scheduler, desk):
        groups: list[tuple[list[Ticket], list[Request]]] = []
        for which, length, n, tokens, given_up, seconds in asked:
            wanted = [request(SHARED[which][:length], tokens, seed, seconds=seconds) for seed in range(n)]
            groups.append((scheduler.submit(wanted), wanted))
            if given_up is not None:
                first = groups[-1][0][0]
                with desk.changed:
                    desk.changed.wait_for(lambda: first in desk.order or len(desk.answer(first)) >= given_up, PATIENCE)  # noqa: B023
                for ticket in groups[-1][0]:
                    scheduler.cancel(ticket)
        tickets = [ticket for group, _ in groups for ticket in group]
        desk.wait(tickets)
        for group, wanted in groups:
            for ticket, each in zip(group, wanted, strict=True):
                ids, end = alone(each, 60)
                assert desk.end(ticket) in {end, "cancelled", "deadline"}
                assert desk.answer(ticket) == (ids if desk.end(ticket) == end else ids[: len(desk.answer(ticket))])
        assert (scheduler.running, scheduler.waiting) == (0, 0)
        assert scheduler._held == slots.held
        assert sum(scheduler.stats.finished.values()) == len(tickets) == len(desk.order)
        started = [ticket.started for ticket in tickets if ticket.started is not None]
        assert started == sorted(started), "first come, first served"
        (later,) = scheduler.submit([request(SHARED[0], 3)])
        desk.wait([later])
        assert desk.answer(later) == alone(request(SHARED[0], 3), 60)[0]


def test_a_long_prompt_does_not_make_the_answers_under_way_wait() -> None:
    gate = Gate(after=2)
    slots = FakeSlots(2, context_length=400, batch_tokens=8, before_step=gate)
    with running(slots) as (scheduler, desk):
        (quick,) = scheduler.submit([request([1], 60)])
        desk.wait_for_tokens(quick)
        (long,) = scheduler.submit([request([2] * 200)])
        gate.open.set()
        desk.wait([quick, long])
    reading = [step for step in slots.steps if any(len(row.ids) > 1 for row in step)]
    assert len(reading) >= 200 // 8
    assert all(sum(len(row.ids) for row in step) <= 8 for step in reading)
    assert all(len(step) == 2 for step in reading[:20]), "a token of the first answer beside each piece of the prompt"


def test_a_prompt_beside_no_other_answer_is_read_in_larger_parts() -> None:
    slots = FakeSlots(2, context_length=400, batch_tokens=8, alone_tokens=64)
    with running(slots) as (scheduler, desk):
        desk.wait(scheduler.submit([request([1] * 300, 1)]))
        alone_parts, before = [len(row.ids) for step in slots.steps for row in step], len(slots.steps)
        desk.wait(scheduler.submit([request([2] * 100, 1), request([3] * 100, 1)]))
    assert alone_parts == [64, 64, 64, 64, 44]
    first = slots.steps[before : before + 100 // 8]
    assert all(sum(len(row.ids) for row in step) == 8 for step in first)


def test_slots_that_are_used_together_lie_side_by_side() -> None:
    slots = FakeSlots(4)
    with running(slots) as (scheduler, desk):
        for number in (0, 1, 2, 3, 2, 0, 3, 1):  # each to a slot of its own, and then again in another order
            desk.wait(scheduler.submit([request([number] * 5, 1)]))
        before = len(slots.steps)
        desk.wait(scheduler.submit([request([8] * 5, 4), request([9] * 5, 4)]))
    assert {tuple(row.slot for row in step) for step in slots.steps[before:] if len(step) == 2} == {(2, 3)}


def test_the_second_turn_of_a_chat_reads_only_what_is_new() -> None:
    slots = FakeSlots(2)
    with running(slots) as (scheduler, desk):
        (first,) = scheduler.submit([request(list(range(20)), 4)])
        desk.wait([first])
        (other,) = scheduler.submit([request([31] * 9, 3)])
        desk.wait([other])
        before = len(slots.steps)
        (second,) = scheduler.submit([request([*range(20), *desk.answer(first), 5, 6], 3)])
        desk.wait([second])
    assert second.cached_tokens == 20 + 3
    assert sum(len(row.ids) for step in slots.steps[before:] for row in step) == 3 + 2


def test_answers_to_one_prompt_read_it_once() -> None:
    slots = FakeSlots(4, context_length=100, batch_tokens=16)
    prompt = list(range(30)) * 2
    with running(slots) as (scheduler, desk):
        tickets = scheduler.submit([request(prompt, 4, seed) for seed in range(4)])
        desk.wait(tickets)
        assert [desk.answer(ticket) for ticket in tickets] == [alone(request(prompt, 4, seed), 100)[0] for seed in range(4)]
    read = sum(len(row.ids) for step in slots.steps for row in step)
    assert read <= len(prompt) + 4 * 4
    assert scheduler.stats.cached_prompt_tokens == 3 * (len(prompt) - 1)


def test_a_beginning_that_all_share_does_not_cost_a_long_conversation_its_place() -> None:
    slots = FakeSlots(3, context_length=100)
    system, long = [1, 2, 3, 4], [1, 2, 3, 4, *range(5, 30)]
    with running(slots) as (scheduler, desk):
        (first,) = scheduler.submit([request(long)])
        desk.wait([first])
        for _ in range(4):
            others = scheduler.submit([request([*system, 30], 2), request([*system, 31], 2)])
            desk.wait(others)
        (again,) = scheduler.submit([request([*long, 8])])
        desk.wait([again])
    assert again.cached_tokens >= len(long)


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    gate = Gate(after=2)
    with running(FakeSlots(1, before_step=gate), max_waiting=2) as (scheduler, desk):
        tickets = scheduler.submit([request([1], 30)])
        desk.wait_for_tokens(tickets[0])
        tickets += scheduler.submit([request([1]), request([2])])
        with pytest.raises(QueueFull) as refused:
            scheduler.submit([request([3])])
        assert refused.value.retry_after >= 1
        scheduler.cancel(tickets[0])
        gate.open.set()
        desk.wait(tickets)
        assert [desk.end(ticket) for ticket in tickets] == ["cancelled", "length", "length"]
        desk.wait(scheduler.submit([request([3])]))


def test_a_quiet_night_is_no_reason_to_come_again_tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, gate = LaterClock(), Gate(after=17)
    told = SimpleNamespace(monotonic=clock.monotonic)
    monkeypatch.setattr(runner, "time", told)  # by which the pace goes
    with running(FakeSlots(1, before_step=gate), max_waiting=0) as (scheduler, desk):
        for _ in range(3):
            desk.wait(scheduler.submit([request([1])]))
            clock.passed += 3600
        tickets = scheduler.submit([request([1], 30)])
        desk.wait_for_tokens(tickets[0])
        with pytest.raises(QueueFull) as refused:
            scheduler.submit([request([3])])
        scheduler.cancel(tickets[0])
        gate.open.set()
        desk.wait(tickets)
    assert refused.value.retry_after < 60


def test_all_of_a_group_are_taken_or_none() -> None:
    with running(FakeSlots(1, pause=0.01), max_waiting=2) as (scheduler, desk):
        with pytest.raises(QueueFull):
            scheduler.submit([request([1])] * 4)
        with pytest.raises(UserError, match="shorten it"):
            scheduler.submit([request([1]), request([1] * 40)])
        assert not desk.events


def test_a_network_that_keeps_failing_is_given_up_and_everybody_is_told() -> None:
    def fail(_: Sequence[Row]) -> None:
        raise RuntimeError("CUDA error")

    with running(FakeSlots(1, before_step=fail), max_waiting=20) as (scheduler, desk):
        tickets = scheduler.submit([request([1]) for _ in range(FAILURES_IN_A_ROW + 4)])
        desk.wait(tickets)
        assert {desk.end(ticket) for ticket in tickets} == {"error"}
        assert all(event.error and "CUDA" not in event.error for ticket in tickets for event in desk.events[ticket])
        assert not scheduler.alive
        with pytest.raises(UserError, match="failed 3 times"):
            scheduler.submit([request([1])])


def test_logits_that_are_not_finite_end_the_answer_they_belong_to() -> None:
    class Broken(FakeSlots):
        def step(self, rows: Sequence[Row]) -> torch.Tensor:
            logits = super().step(rows)
            for place, row in enumerate([row for row in rows if row.wants_logits]):
                if self.held[row.slot][0] == 9:
                    logits[place, 4] = float("nan")
            return logits

    with running(Broken()) as (scheduler, desk):
        bad, good = scheduler.submit([request([9, 1]), request([1, 9])])
        desk.wait([bad, good])
        assert desk.end(bad) == "error"
        assert (desk.answer(good), desk.end(good)) == alone(request([1, 9]))


def test_a_form_that_fails_ends_its_own_answer_alone() -> None:
    class Raising:
        def allowed(self) -> np.ndarray:
            raise RuntimeError("out of fuel")

        def take(self, token: int) -> None:
            raise AssertionError

    class Forgetful(Raising):
        def allowed(self) -> np.ndarray:
            return np.ones(VOCAB, dtype=bool)

    class Nothing(Raising):
        def allowed(self) -> np.ndarray:
            return np.zeros(VOCAB, dtype=bool)

    with running(FakeSlots(4)) as (scheduler, desk):
        *failing, good = scheduler.submit(
            [request([2], constraint=form()) for form in (Raising, Forgetful, Nothing)] + [request([3], 8)]
        )
        desk.wait([*failing, good])
        assert [desk.end(ticket) for ticket in failing] == ["error"] * 3
        assert (desk.answer(good), desk.end(good)) == alone(request([3], 8))
        assert scheduler.alive
        assert (scheduler.running, scheduler.waiting) == (0, 0)


def test_closing_lets_answers_end_and_cuts_off_what_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = FakeSlots(2, context_length=100_000, pause=1e-3)
    desk = Desk()
    scheduler = Scheduler(slots, VOCAB, desk.deliver)
    scheduler.start()
    short, endless = scheduler.submit([request([1], 20), request([2], 90_000)])
    desk.wait_for_tokens(endless)
    clock = SimpleNamespace(monotonic=lambda: float(short in desk.order), perf_counter=time.perf_counter, sleep=time.sleep)
    monkeypatch.setattr(scheduler_room, "time", clock)  # the time is over when the short one has ended
    assert scheduler.close(seconds=0.5) == 1
    assert (desk.end(short), desk.end(endless)) == ("length", "cancelled")
    with pytest.raises(UserError, match="shutting down"):
        scheduler.submit([request([1])])


def test_a_penalty_that_takes_large_logits_beyond_numbers_ends_its_own_answer_alone() -> None:
    class Large(FakeSlots):
        def step(self, rows: Sequence[Row]) -> Any:
            return super().step(rows) * 1e36

    with running(Large()) as (scheduler, desk):
        settings = [SamplingParams(0, repetition_penalty=penalty, max_new_tokens=4) for penalty in (0.01, 1.0)]
        tickets = scheduler.submit([Request(list(range(VOCAB)), sampling) for sampling in settings])
        desk.wait(tickets)
        assert [desk.end(ticket) for ticket in tickets] == ["error", "length"]
        later = scheduler.submit([request([3], 4, temperature=0)])
        desk.wait(later)
        assert desk.end(later[0]) == "length"


def test_log_probabilities_are_the_networks_own_and_bias_and_constraint_change_what_comes() -> None:
    class Even:
        taken: list[int]

        def __init__(self) -> None:
            self.taken = []

        def allowed(self) -> np.ndarray:
            return np.arange(VOCAB) % 2 == len(self.taken) % 2

        def take(self, token: int) -> None:
            self.taken.append(token)

    even = Even()
    with running(FakeSlots()) as (scheduler, desk):
        plain, biased, formed = scheduler.submit(
            [
                request([3], 4, temperature=0, top_logprobs=2),
                request([3], 4, temperature=0, logit_bias={11: 100.0}),
                request([3], 6, temperature=0.7, constraint=even),
            ]
        )
        desk.wait([plain, biased, formed])
        held = [3]
        for token in [token for event in desk.events[plain] for token in event.tokens]:
            exact = logits_after(held).double().log_softmax(-1)
            assert token.logprob == pytest.approx(float(exact[token.id]))
            assert [id_ for id_, _ in token.top] == exact.topk(2).indices.tolist()
            held.append(token.id)
        assert desk.answer(biased) == [11] * 4
        assert [token % 2 for token in desk.answer(formed)] == [0, 1, 0, 1, 0, 1]
        assert even.taken == desk.answer(formed)
