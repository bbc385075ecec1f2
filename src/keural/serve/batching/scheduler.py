"""Shares a network's steps out among requests: one thread, a queue in the order of arrival, prompts read in pieces between the
tokens of the answers under way.

In: requests, from any thread. Out: events, handed on once a step. What a slot holds stays there after an answer, so that the next
prompt that begins alike reads only what is new.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from keural.errors import UserError
from keural.serve.batching.mail import TOGETHER, Mail
from keural.serve.batching.requests import Chosen, End, Request
from keural.serve.batching.runner import Cancelled, Deliver, Pace, Stats, Ticket, Unhonoured
from keural.serve.batching.slots import Row, Slots
from keural.serve.engines.decoding import check_prompt, common_prefix
from keural.serve.engines.sampling import NOT_FINITE, Logits, Sampler, choose_where_possible, have_best, quiet

FAILURES_IN_A_ROW = 3
"""Failed steps after which the network is taken for broken."""
WORTH_WAITING = 16
"""Tokens of a beginning that two requests share from which one waits for the other to read it."""

GIVE_WAY = 5e-4
"""Seconds for the first token of an answer to be sent in. Where a step takes all processors, whoever is woken just before it would
wait until it ends.
"""

LEAST_LOGPROB = -9999.0
"""The log-probability of a token that the network rules out: OpenAI's word for it, where JSON has none for minus infinity."""
FORM_FAILED = "no token may come next by the form that was asked for"

log = logging.getLogger("keural.serve")


class SampledTicket(Ticket):
    """A request whose tokens are chosen here."""

    def __init__(self, request: Request, number: int, vocab_size: int, now: float) -> None:
        super().__init__(request, number, now)
        self.sampler = Sampler(request.sampling, request.prompt_ids, vocab_size)
        self.is_plain = not request.logit_bias and request.constraint is None
        """Whether its tokens follow from the network's logits and its sampler alone."""
        self.slot: int | None = None


class Scheduler:
    """Runs requests on `slots`, at most `max_waiting` of them waiting; `start` it, and `close` it in the end."""

    def __init__(
        self, slots: Slots, vocab_size: int, deliver: Deliver, max_waiting: int = 16, *, together: float = TOGETHER
    ) -> None:
        """`together`: seconds that a token may wait for others to be handed on with it."""
        self.slots, self.vocab_size, self.max_waiting = slots, vocab_size, max_waiting
        self.stats = Stats()
        self.broken: str | None = None
        """Why no request can be answered any more."""
        self._held: list[list[int]] = [[] for _ in range(slots.count)]
        """The ids that each slot holds."""
        self._used = [0] * slots.count
        """When each slot was last used, in steps."""
        self._active: dict[int, SampledTicket] = {}
        self._waiting: deque[SampledTicket] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._failures = 0
        self._pace = Pace()
        self._numbers = 0
        self._mail = Mail(deliver, together)
        self._has_first = False
        """Whether there is the first token of an answer in the mail."""
        self._thread = threading.Thread(target=self._run, name="keural-network", daemon=True)

    # From any thread

    def unhonoured(self, request: Request) -> Unhonoured | None:
        """See `Runner.unhonoured`: here every setting is kept."""
        return None

    def start(self) -> None:
        """Start the thread that owns the network."""
        self._thread.start()

    def check_free(self) -> None:
        """See `Runner.check_free`."""
        self._check_free(1)

    def submit(self, requests: Sequence[Request]) -> list[SampledTicket]:
        """Queue requests, all of them or none.

        Raises:
            UserError: when a prompt is empty or leaves no room for an answer, or the network is broken.
            QueueFull: when too many wait already.
        """
        for request in requests:
            check_prompt(request.prompt_ids, self.slots.context_length)
        with self._wake:
            if self.broken is not None or self._closing:
                raise UserError(self.broken or "the server is shutting down")
            self._check_free(len(requests))
            now = time.monotonic()
            tickets = [
                SampledTicket(request, self._numbers + place, self.vocab_size, now) for place, request in enumerate(requests)
            ]
            self._numbers += len(tickets)
            self._waiting += tickets
            self._wake.notify()
        return tickets

    def cancel(self, ticket: Ticket, end: Cancelled = "cancelled") -> None:
        """End a request at the next step, if it has not ended; it counts as `end`."""
        with self._wake:
            ticket.cancel(end)
            self._wake.notify()

    def close(self, seconds: float = 0.0) -> int:
        """Take no more requests, let those under way go on for so long, and stop; returns how many were cut off."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        end = time.monotonic() + seconds
        while self._thread.is_alive() and (self._active or self._waiting) and time.monotonic() < end:
            time.sleep(0.01)
        with self._wake:
            left = [*self._active.values(), *self._waiting]
            for ticket in left:
                ticket.cancel("cancelled")
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        return len(left)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def held_tokens(self) -> int:
        """Tokens that the slots hold, idle ones included."""
        return sum(map(len, self._held))

    @property
    def alive(self) -> bool:
        """Whether the thread runs that owns the network."""
        return self._thread.is_alive() and self.broken is None

    def _check_free(self, asked: int) -> None:
        self._pace.admit(asked, len(self._waiting), len(self._active), self.max_waiting + self.slots.count)

    def _free(self) -> int:
        return self.slots.count - len(self._active)

    # In the network's thread

    @quiet
    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            log.exception("the scheduler failed")
            self._give_up(f"the scheduler failed: {type(error).__name__}")

    def _turn(self) -> bool:
        """One step; False when there is nothing to do any more."""
        with self._wake:
            while not (self._active or self._waiting):
                if self._closing:
                    return False
                self._wake.wait()
            self._leave()
            self._admit()
        rows = self._rows()
        if any(len(row.ids) > 1 for row in rows):
            self._mail.hand_on()  # a part of a prompt takes longer than the step before
        if rows:
            self._step(rows)
        elif self._waiting and not self._active:
            raise RuntimeError("requests wait while all slots are free")
        if not rows or self._mail.is_due():
            self._mail.hand_on()
            if self._has_first and self.slots.on_processors:
                time.sleep(GIVE_WAY)
            self._has_first = False
        return self.broken is None

    def _leave(self) -> None:
        """End what was cancelled or is too late, wherever it is."""
        now = time.monotonic()
        for ticket in [*self._active.values(), *self._waiting]:
            if ticket.cancelled or now > ticket.deadline:
                self._end(ticket, ticket.cancelled_as if ticket.cancelled else "deadline")
        if self._waiting:
            self._waiting = deque(ticket for ticket in self._waiting if ticket.end is None)

    def _admit(self) -> None:
        """Give free slots to those who wait, in their order."""
        while self._waiting and self._free():
            ticket = self._waiting[0]
            prompt = ticket.request.prompt_ids
            shared = [common_prefix(held, prompt) for held in self._held]
            promised = max((common_prefix(other.request.prompt_ids, prompt) for other in self._reading()), default=0)
            if promised >= WORTH_WAITING and promised > max(shared):
                return  # somebody is just reading what this one needs
            self._waiting.popleft()
            slot, held = self._place(shared)
            self._held[slot] = list(prompt[:held])
            ticket.slot, ticket.started, ticket.cached_tokens = slot, time.monotonic(), held
            self._active[slot] = ticket
            self.stats.prompt_tokens += len(prompt)
            self.stats.cached_prompt_tokens += held

    def _place(self, shared: Sequence[int]) -> tuple[int, int]:
        """A free slot for a prompt of which each slot holds the first `shared` tokens, and how many it now holds.

        A slot that holds little else goes on with its own tokens. Otherwise they are copied to the one that was not used for the
        longest time, so that a short beginning that all share does not cost somebody's long conversation. Of the half of the free
        slots that was not used for the longest time it is one beside the slots in use, where there is one: networks read slots that
        lie side by side together, and those with a gap between them one after the other.
        """
        active = self._active
        free = [slot for slot in range(self.slots.count) if slot not in active]
        most = max(shared)
        holding = [slot for slot, length in enumerate(shared) if length == most]
        source = max(holding, key=lambda slot: (slot not in active, -len(self._held[slot])))
        oldest = sorted(free, key=self._used.__getitem__)[: (len(free) + 1) // 2]
        target = max(oldest, key=lambda slot: (slot - 1 in active) + (slot + 1 in active))
        if source not in active and 2 * shared[source] >= len(self._held[source]):
            target = source
        held = self.slots.copy(source, target, shared[source]) if target != source else self.slots.cut(target, shared[source])
        if held > shared[source]:
            raise RuntimeError("a slot holds more than it was told to")
        return target, held

    def _reading(self) -> list[SampledTicket]:
        """Those whose prompt is not read to its end."""
        return [ticket for slot, ticket in self._active.items() if len(self._held[slot]) < len(ticket.request.prompt_ids)]

    def _rows(self) -> list[Row]:
        """The next token of every answer, and of the prompts, oldest first, what there is room for; by slots, the lowest first."""
        rows, reading = [], []
        for slot, ticket in self._active.items():
            if len(self._held[slot]) < len(ticket.request.prompt_ids):
                reading.append((ticket.number, slot))
            else:
                rows.append(Row(slot, ticket.answer[-1:], len(self._held[slot]), True))
        room = max(1, self.slots.batch_tokens - len(rows)) if len(self._active) > 1 else self.slots.alone_tokens
        for _, slot in sorted(reading):
            prompt, held = self._active[slot].request.prompt_ids, len(self._held[slot])
            part = prompt[held : held + room]
            rows.append(Row(slot, part, held, held + len(part) == len(prompt)))
            room -= len(part)
            if room <= 0:
                break
        return sorted(rows, key=lambda row: row.slot)

    def _step(self, rows: list[Row]) -> None:
        """Read the rows, and choose a token for those that want one."""
        begun = time.perf_counter()
        try:
            logits = self.slots.step(rows)
        except Exception as error:  # whatever a network raises is said to those who asked, and the server goes on
            log.exception("a step of the network failed")
            self._fail(rows, error)
            return
        self._failures = 0
        for row in rows:
            self._held[row.slot] += row.ids
            self._used[row.slot] = self.stats.steps
        middle = time.perf_counter()
        self._choose([self._active[row.slot] for row in rows if row.wants_logits], logits)
        self.stats.steps += 1
        self.stats.step_seconds += middle - begun
        self.stats.sampler_seconds += time.perf_counter() - middle
        self.stats.last_step = time.monotonic()

    def _choose(self, tickets: list[SampledTicket], logits: Logits) -> None:
        """The next token of each answer; one whose own settings fail ends alone."""
        if all(ticket.is_plain for ticket in tickets):
            places: Sequence[int] = range(len(tickets))
            tokens = choose_where_possible(logits, [ticket.sampler for ticket in tickets])
        else:
            places, shaped = self._shape(tickets, logits)
            tokens = choose_where_possible(shaped, [tickets[place].sampler for place in places])
        for place, token in zip(places, tokens, strict=True):
            if token is None:
                self._end(tickets[place], "error", NOT_FINITE)
            else:
                self._take(tickets[place], token, logits, place)

    def _shape(self, tickets: list[SampledTicket], logits: Logits) -> tuple[list[int], list[Logits]]:
        """The logits `[V]` of those that are still to go on, and their places; others have ended."""
        places: list[int] = []
        rows: list[Logits] = []
        for place, (ticket, good) in enumerate(zip(tickets, have_best(logits), strict=True)):
            if not good:
                self._end(ticket, "error", NOT_FINITE)
            elif (scores := logits[place] if ticket.is_plain else self._shaped(ticket, torch.as_tensor(logits[place]))) is not None:
                places.append(place)
                rows.append(scores)
        return places, rows

    def _shaped(self, ticket: SampledTicket, logits: Tensor) -> Tensor | None:
        """The logits `[V]` with the request's bias and form; None where that failed, and the request has ended."""
        request = ticket.request
        scores = logits.clone()
        for token, bias in request.logit_bias.items():
            scores[token] += bias
        if request.constraint is not None:
            try:
                allowed = torch.from_numpy(np.asarray(request.constraint.allowed()))
            except Exception:
                log.exception("the form of an answer failed")
                self._end(ticket, "error", FORM_FAILED)
                return None
            scores.masked_fill_(~allowed.to(scores.device), float("-inf"))
        if not torch.isfinite(scores.max()):
            self._end(ticket, "error", FORM_FAILED)
            return None
        return scores

    def _take(self, ticket: SampledTicket, token: int, logits: Logits, place: int) -> None:
        """Add a token to an answer, or end it; the network's logits for it are in that place."""
        request = ticket.request
        if token in request.stop_ids:
            return self._end(ticket, "stop")
        if request.constraint is not None:
            try:
                request.constraint.take(token)
            except Exception:
                log.exception("the form of an answer failed")
                return self._end(ticket, "error", FORM_FAILED)
        if ticket.first_token is None:
            ticket.first_token = time.monotonic()
            self._has_first = True
            self._mail.hurry()
        ticket.answer.append(token)
        self.stats.answer_tokens += 1
        top = request.top_logprobs
        self._mail.add(ticket, Chosen(token) if top is None else _with_logprobs(token, torch.as_tensor(logits[place]), top))
        if len(request.prompt_ids) + len(ticket.answer) >= self.slots.context_length:
            return self._end(ticket, "context")
        if len(ticket.answer) >= request.sampling.max_new_tokens:
            return self._end(ticket, "length")
        return None

    def _end(self, ticket: SampledTicket, end: End, error: str | None = None) -> None:
        """The one place where a request ends."""
        if ticket.end is not None:
            return
        ticket.end = end
        if ticket.slot is not None:
            del self._active[ticket.slot]
        self._pace.end()
        self.stats.count_end(end)
        self._mail.end(ticket, end, error)

    def _fail(self, rows: list[Row], error: Exception) -> None:
        """End the requests of a failed step; after some in a row, all of them and every later one."""
        for row in rows:
            self._held[row.slot] = []
            self._end(self._active[row.slot], "error", "the model failed while it was computing")
            with contextlib.suppress(Exception):  # of a network that has failed
                self.slots.cut(row.slot, 0)
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            self._give_up(f"the model failed {self._failures} times in a row: {type(error).__name__}")

    def _give_up(self, why: str) -> None:
        with self._wake:
            self.broken = why
            for ticket in [*self._active.values(), *self._waiting]:
                self._end(ticket, "error", "the model does not answer any more")
            self._waiting.clear()
        self._mail.hand_on()


def _with_logprobs(token: int, logits: Tensor, top: int) -> Chosen:
    logprobs = logits.double().log_softmax(dim=-1).clamp_min(LEAST_LOGPROB)
    values, ids = logprobs.topk(top) if top else (logprobs[:0], logprobs[:0])
    return Chosen(token, float(logprobs[token]), tuple(zip(map(int, ids.tolist()), values.tolist(), strict=True)))
