"""What every address of the server works with: the model, its answers, and the settings that hold without others.

In: a tokenizer and slots. Out: one object that the application hands to its routes.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from keural.errors import UserError
from keural.serve.batching.requests import QueueFull
from keural.serve.batching.runner import Deliver, Runner
from keural.serve.batching.scheduler import Scheduler
from keural.serve.batching.slots import Slots
from keural.serve.constrain import Grammars
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.jamo import Jamo
from keural.serve.server.answers import Answers
from keural.serve.server.errors import ApiError
from keural.serve.server.keys import Keys
from keural.serve.server.metrics import Metrics
from keural.serve.server.settings import Limits
from keural.serve.text import speller
from keural.serve.upstream.runner import Upstreams
from keural.tokenizer import KeuralTokenizer

Result = TypeVar("Result")
STALLED = 60.0
"""Seconds without a step of the network, while there are answers under way, after which it is taken for dead."""
READERS = 2
"""Threads that turn text into ids: a long prompt must not hold up the loop, and many of them not the network."""


@dataclass
class Service:
    """A model that answers."""

    tokenizer: KeuralTokenizer
    slots: Slots | Upstreams
    name: str
    defaults: SamplingParams = field(default_factory=SamplingParams)
    system: str | None = None
    """Of conversations that begin with none."""
    jamo: Jamo = "compatibility"
    limits: Limits = field(default_factory=Limits)
    keys: Keys | None = None
    hosts: frozenset[str] | None = None
    """Names by which it may be called; None: any."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Shown with the model's name."""
    trained_on_tools: bool = False
    """Whether the model is known to have been trained on calls of tools, so that it may be asked to decide about them."""
    metrics_prefix: str = "keural"
    log: Callable[[Mapping[str, Any]], None] = lambda _: None
    """Takes one entry of the log."""

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.draining = False
        self.connections: Callable[[], int] = lambda: 0
        """How many are open, where a server counts them."""
        self.metrics = Metrics(self.metrics_prefix, self.name)
        self.answers = Answers(self._runner, self.metrics.observe)
        self.metrics.watch(self.answers.scheduler)
        self.grammars = Grammars(self.tokenizer)
        self.spell = speller(self.tokenizer, self.jamo)
        self._readers = ThreadPoolExecutor(READERS, "keural-text")

    def _runner(self, deliver: Deliver) -> Runner:
        if isinstance(self.slots, Upstreams):
            return self.slots.delivering(deliver, self.limits.waiting)
        return Scheduler(self.slots, self.tokenizer.vocab_size, deliver, self.limits.waiting)

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.slots.context_length

    async def read(self, function: Callable[..., Result], *arguments: Any, param: str | None = None) -> Result:
        """Call what turns text into ids, or a form into a constraint, beside the loop. Raises `ApiError` where that cannot be."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)
        except UserError as error:
            raise ApiError(400, str(error), param, "invalid_value") from error

    def check_room(self, prompt_ids: Sequence[int], param: str) -> None:
        """Raise `ApiError` unless the prompt leaves room for an answer."""
        count, most = len(prompt_ids), self.context_length
        if count >= most:
            raise ApiError(
                400,
                f"the prompt has {count} tokens and this model's context is {most}, with room for at least one of the answer",
                param,
                "context_length_exceeded",
            )

    def check_queue(self) -> None:
        """Raise `ApiError` where no request is taken now, whatever it asks for."""
        try:
            self.answers.scheduler.check_free()
        except QueueFull as error:
            raise self.queue_full(error) from error

    def queue_full(self, error: QueueFull) -> ApiError:
        """How a client hears that too many wait."""
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(math.ceil(error.retry_after))})

    def check_model(self, name: str | None) -> None:
        """Raise `ApiError` for another model than this."""
        if name is not None and name != self.name:
            raise ApiError(404, f"there is no model of this name here; this server has `{self.name}`", "model", "model_not_found")

    def trouble(self) -> str | None:
        """Why it cannot answer any more; None while it can."""
        scheduler = self.answers.scheduler
        if not scheduler.alive:
            return scheduler.broken or "the network's thread has ended"
        last = max(self.answers.last_news, scheduler.stats.last_step or 0.0)
        if self.answers.open and time.monotonic() - last > STALLED:
            return f"no step of the network for more than {STALLED:.0f} s"
        return None
