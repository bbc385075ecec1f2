"""What is counted and timed, by the names that dashboards for vLLM know, behind a prefix.

In: the scheduler's counters, and every event. Out: Prometheus' text. No label comes from a request.
"""

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from keural.serve.batching.requests import Event
from keural.serve.batching.runner import Runner, Ticket
from keural.serve.batching.scheduler import Scheduler
from keural.serve.upstream.runner import Upstreams

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
REASONS = ("queue_full", "draining", "key", "host", "body_too_large", "header_too_large", "too_slow", "connections")
"""Why a request was not even looked at."""
FINISHED: dict[str, str] = {
    "stop": "stop", "length": "length", "context": "length", "cancelled": "abort", "deadline": "deadline", "error": "error",
    "unavailable": "error", "refused": "error",
}  # fmt: skip
"""How an answer ended, in the words of vLLM's counter, which has no deadline."""


class Metrics:
    """The counters of one server."""

    def __init__(self, prefix: str, model: str) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._prefix, self._model = prefix, model
        names: dict[str, Any] = {"labelnames": ["model_name"], "registry": self.registry}

        def histogram(name: str, what: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"{prefix}:{name}", what, buckets=buckets, **names).labels(model)

        self._first = histogram("time_to_first_token_seconds", "From the arrival of a request to its first token.")
        self._between = histogram("inter_token_latency_seconds", "From token to token of an answer.")
        self._whole = histogram("e2e_request_latency_seconds", "From the arrival of a request to the end of its answer.")
        self._queued = histogram("request_queue_time_seconds", "In the queue.")
        self._prefill = histogram("request_prefill_time_seconds", "From the queue to the first token.")
        self._decode = histogram("request_decode_time_seconds", "From the first token to the end.")
        self._inference = histogram("request_inference_time_seconds", "From the queue to the end.")
        self._each = histogram("request_time_per_output_token_seconds", "From token to token, the mean of an answer.")
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._answer = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._asked = histogram("request_params_max_tokens", "Most tokens that an answer could have.", TOKENS)
        self._gone = Counter(f"{prefix}:http_requests_client_disconnected", "Requests whose client left before the end.", **names)
        self._rejected = Counter(
            f"{prefix}:requests_rejected", "Requests that were turned away.", ["model_name", "reason"], registry=self.registry
        )
        self._http = Counter(f"{prefix}:http_requests", "Requests by status.", ["model_name", "status"], registry=self.registry)
        self._gone.labels(model)
        for reason in REASONS:
            self._rejected.labels(model, reason)
        self._last: dict[Ticket, float] = {}

    def watch(self, runner: Runner) -> None:
        """Show a runner's counters, too."""
        self.registry.register(_Counters(self._prefix, self._model, runner))

    def observe(self, ticket: Ticket, event: Event) -> None:
        """Time an event of a request."""
        now = time.monotonic()
        if event.tokens:
            if ticket in self._last:
                self._between.observe((now - self._last[ticket]) / len(event.tokens))
            else:
                self._first.observe(now - ticket.submitted)
            self._last[ticket] = now
        if event.end is not None:
            self._last.pop(ticket, None)
            self._whole.observe(now - ticket.submitted)
            self._queued.observe((ticket.started or now) - ticket.submitted)
            self._prompt.observe(len(ticket.request.prompt_ids))
            self._asked.observe(ticket.request.sampling.max_new_tokens)
            if ticket.started is not None:
                self._inference.observe(now - ticket.started)
            if ticket.first_token is not None:
                self._prefill.observe(ticket.first_token - (ticket.started or ticket.submitted))
                self._decode.observe(now - ticket.first_token)
                if len(ticket.answer) > 1:
                    self._each.observe((now - ticket.first_token) / (len(ticket.answer) - 1))

    def count_answer(self, tokens: int) -> None:
        """Count an answer of so many tokens, as its usage does: up to its stop string, behind which the network may go on."""
        self._answer.observe(tokens)

    def client_left(self) -> None:
        """Count a client that did not wait for the end."""
        self._gone.labels(self._model).inc()

    def rejected(self, reason: str) -> None:
        """Count a request that was turned away for one of `REASONS`."""
        self._rejected.labels(self._model, reason).inc()

    def answered(self, status: int) -> None:
        """Count a status that was sent."""
        self._http.labels(self._model, str(status)).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self.registry)


class _Counters:
    """A runner's counters at the moment when they are asked for. What it does not know of itself is absent, not 0."""

    def __init__(self, prefix: str, model: str, runner: Runner) -> None:
        self._prefix, self._model, self._runner = prefix, model, runner

    def describe(self) -> list[Metric]:
        """Nothing: names are known when the counters are asked for."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every counter."""
        stats = self._runner.stats
        yield self._gauge("num_requests_running", "Answers under way.", self._runner.running)
        yield self._gauge("num_requests_waiting", "Answers in the queue.", self._runner.waiting)
        yield self._counter("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens)
        yield self._counter(
            "generation_tokens", "Tokens of answers that were computed, those behind a stop string too.", stats.answer_tokens
        )
        ended = CounterMetricFamily(
            f"{self._prefix}:request_success", "Requests by how they ended.", labels=["model_name", "finished_reason"]
        )
        counts = dict.fromkeys(FINISHED.values(), 0)
        for end, count in dict(stats.finished).items():
            counts[FINISHED[end]] += count
        for reason, count in counts.items():
            ended.add_metric([self._model, reason], count)
        yield ended
        if isinstance(self._runner, Scheduler):
            yield from self._of_network(self._runner)
        if isinstance(self._runner, Upstreams):
            yield from self._of_servers(self._runner)

    def _of_network(self, scheduler: Scheduler) -> Iterator[Metric]:
        """What a network of our own knows."""
        stats, slots = scheduler.stats, scheduler.slots
        capacity = slots.count * slots.context_length
        yield self._gauge(
            "kv_cache_usage_perc", "Part of the slots' room that is held, from 0 to 1.", scheduler.held_tokens / capacity
        )
        yield from self._prefix_cache(stats.prompt_tokens, stats.cached_prompt_tokens)
        yield self._counter("steps", "Steps of the network.", stats.steps)
        yield self._counter("step_seconds", "Time of the network in its steps.", stats.step_seconds)
        yield self._counter("sampler_seconds", "Time in which tokens were chosen.", stats.sampler_seconds)
        if hasattr(slots, "expert_load"):
            yield self._expert_load(slots.expert_load().tolist())

    def _of_servers(self, upstreams: Upstreams) -> Iterator[Metric]:
        """What is known of servers elsewhere: by their place on the command line, from 0 on."""
        if upstreams.counted_prompt_tokens:
            yield from self._prefix_cache(upstreams.counted_prompt_tokens, upstreams.stats.cached_prompt_tokens)
        labels = ["model_name", "upstream"]
        up = GaugeMetricFamily(f"{self._prefix}:upstream_up", "Whether a server answers.", labels=labels)
        asked = CounterMetricFamily(f"{self._prefix}:upstream_requests", "Requests that a server was given.", labels=labels)
        failed = CounterMetricFamily(f"{self._prefix}:upstream_failures", "Requests that a server did not end.", labels=labels)
        restarts = CounterMetricFamily(f"{self._prefix}:engine_restarts", "Times that an engine was started again.", labels=labels)
        for place, server in enumerate(upstreams.servers):
            label = [self._model, str(place)]
            up.add_metric(label, server.trouble is None)
            asked.add_metric(label, server.asked)
            failed.add_metric(label, server.failed)
            if server.child is not None:
                restarts.add_metric(label, server.child.restarts)
        yield from (up, asked, failed, restarts)

    def _prefix_cache(self, queries: int, hits: int) -> Iterator[Metric]:
        yield self._counter("prefix_cache_queries", "Tokens of prompts that were looked up.", queries)
        yield self._counter("prefix_cache_hits", "Tokens of prompts that were held already.", hits)

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}:{name}", what, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}:{name}", what, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _expert_load(self, load: list[list[int]]) -> Metric:
        labels = ["model_name", "layer", "expert"]
        family = CounterMetricFamily(f"{self._prefix}:expert_tokens", "Tokens that each expert was given.", labels=labels)
        for layer, counts in enumerate(load):
            for expert, count in enumerate(counts):
                family.add_metric([self._model, str(layer), str(expert)], count)
        return family
