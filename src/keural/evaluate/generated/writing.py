"""Answers of a model to many prompts at once, on the serving scheduler: rows leave as they finish, others take their places.

In: prompts as ids, each with its settings. Out: the text of each answer and why it ended, as they finish. Nothing depends on time:
all prompts wait before the first step, and stop strings are looked for between steps.
"""

from collections.abc import Iterator, Sequence
from queue import SimpleQueue

from keural.errors import UserError
from keural.evaluate.tasks.items import Writing, Written
from keural.serve.batching.requests import End, Event, Request
from keural.serve.batching.runner import Ticket
from keural.serve.batching.scheduler import Scheduler
from keural.serve.batching.slots import Slots
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.stops import StopStrings
from keural.tokenizer import KeuralTokenizer


def write_answers(slots: Slots, tokenizer: KeuralTokenizer, wanted: Sequence[Writing]) -> Iterator[tuple[int, Written]]:
    """Answer every prompt; yields its number and its answer as they finish, each once.

    Args:
        slots: of the network; nobody else uses them meanwhile.
        tokenizer: the network's.
        wanted: prompts, each shorter than the network's context.

    Raises:
        UserError: when a prompt does not fit, or the network fails or gives no finite numbers.
    """
    if not wanted:
        return
    finished: SimpleQueue[tuple[int, Written | UserError]] = SimpleQueue()
    book = _Book(tokenizer, finished)
    scheduler = Scheduler(slots, tokenizer.vocab_size, book.deliver, max_waiting=len(wanted), together=0)
    stop_ids = frozenset({tokenizer.im_end_id, tokenizer.eos_id})
    tickets = scheduler.submit([Request(one.prompt_ids, _sampling(one), stop_ids) for one in wanted])
    for number, (ticket, one) in enumerate(zip(tickets, wanted, strict=True)):
        book.open(ticket, number, one.stop)
    scheduler.start()
    try:
        for _ in wanted:
            number, answer = finished.get()
            if isinstance(answer, UserError):
                raise answer
            yield number, answer
    finally:
        scheduler.close()


def _sampling(one: Writing) -> SamplingParams:
    return SamplingParams(one.temperature, one.top_p, 1.0, one.max_new_tokens, one.seed if one.temperature else None)


class _Book:
    """The texts of answers as their tokens come, in the thread of the network."""

    def __init__(self, tokenizer: KeuralTokenizer, finished: "SimpleQueue[tuple[int, Written | UserError]]") -> None:
        self._tokenizer, self._finished = tokenizer, finished
        self._open: dict[int, _Text] = {}

    def open(self, ticket: Ticket, number: int, stop: Sequence[str]) -> None:
        """Begin the text of an answer."""
        self._open[ticket.number] = _Text(number, self._tokenizer, stop)

    def deliver(self, events: Sequence[tuple[Ticket, Event]]) -> None:
        """Take what came of a step."""
        for ticket, event in events:
            text = self._open.get(ticket.number)
            if text is None:
                continue
            for chosen in event.tokens:
                text.push(chosen.id)
            if text.stops.found is not None:
                ticket.cancel("stop")  # seen at the next step, in this thread
            if event.end is not None:
                del self._open[ticket.number]
                failed = event.end in ("error", "deadline")
                self._finished.put((text.number, UserError(f"generation: {event.error}") if failed else text.close(event.end)))


class _Text:
    """The text of one answer."""

    def __init__(self, number: int, tokenizer: KeuralTokenizer, stop: Sequence[str]) -> None:
        self.number, self.stops = number, StopStrings(stop)
        self._decoder = tokenizer.stream_decoder()
        self._parts: list[str] = []
        self._tokens = 0

    def push(self, token: int) -> None:
        """One more token."""
        self._tokens += 1
        self._parts.append(self.stops.push(self._decoder.push(token)))

    def close(self, end: End) -> Written:
        """The answer; what was held back belongs to it, where no stop string ended it."""
        if self.stops.found is None:
            self._parts += [self.stops.push(self._decoder.flush()), self.stops.flush()]
        return Written("".join(self._parts), self._tokens, end)
