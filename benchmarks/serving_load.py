"""The server under load, around a network that only waits (`serving_stub.py`), in a process of its own.

    python benchmarks/serving_load.py WORK_DIR [--parts streams,overload,soak] [--minutes 20] [--out FILE] [--small]

streams: so many connections at once, each a stream of one answer. What is counted is what every client got, and the processor time
of the server's process for each event that it sent, its share of everything included: scheduler, sampler, HTTP, log.
overload: what gets through at ten times as many requests as the server can answer, beside what gets through when there are just
enough, in alternating rounds; how long a refusal takes, and `/health` meanwhile.
soak: minutes of requests of every kind, streamed or not, cut off at any moment, wrong, too long, too late. Memory over time, and
whether in the end every request that was taken has ended exactly once, and no slot is lost.

Without `--parts` and `--minutes` it takes about 25 minutes; `--parts streams,overload` about 3.
"""

import argparse
import asyncio
import collections
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.serving_client import Reply, Server, ask, end_gently, heading, part_of, started, table  # noqa: E402
from keural.errors import UserError  # noqa: E402
from keural.serve.server.start import bind  # noqa: E402

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS = "the cat sees a small red house and two blue birds"


class Sizes(NamedTuple):
    """How much is done."""

    streams: int = 1000
    stream_tokens: int = 40
    stream_step_ms: float = 500.0
    slots: int = 8
    waiting: int = 32
    overload_step_ms: float = 10.0
    answer: int = 60
    seconds: float = 12.0
    rounds: int = 4
    minutes: float = 20.0
    soak_workers: int = 24
    soak_step_ms: float = 5.0


SMALL = Sizes(50, 8, 100.0, 4, 8, 5.0, 10, 1.0, 1, 0.05, 12, 2.0)


def stub(work: Path, name: str, slots: int, waiting: int, step_ms: float) -> Any:
    """A started stub server."""
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    options = [f"--slots={slots}", f"--waiting={waiting}", f"--step-ms={step_ms}"]
    script = str(ROOT / "benchmarks" / "serving_stub.py")
    return started([sys.executable, script, str(port), str(work / "tokenizer"), *options], port, work / f"{name}.log")


def chat(tokens: int, stream: bool = True, **more: Any) -> dict[str, Any]:
    """A request."""
    return {"messages": [{"role": "user", "content": WORDS}], "max_tokens": tokens, "stream": stream, **more}


def streams(work: Path, sizes: Sizes) -> str:
    """Many connections that stream at once."""
    with stub(work, "streams", sizes.streams, sizes.streams, sizes.stream_step_ms) as server:
        asyncio.run(_many(server, 3, 3))  # what is imported and compiled at the first request
        before, memory = server.cpu_seconds(), server.resident_mb()
        begun = time.monotonic()
        replies = asyncio.run(_many(server, sizes.streams, sizes.stream_tokens))
        seconds, used, peak = time.monotonic() - begun, server.cpu_seconds() - before, server.resident_mb()
    whole = sum(reply.status == 200 and reply.done for reply in replies)
    events = sum(reply.events for reply in replies)
    tokens = sum(reply.json()["usage"]["completion_tokens"] for reply in replies if reply.done)
    gaps = [later - sooner for reply in replies for sooner, later in zip(reply.arrivals[1:], reply.arrivals[2:], strict=False)]
    rows = [
        ["streams that came whole", f"{whole} of {sizes.streams}", "all"],
        ["tokens that came", f"{tokens:,} of {sizes.streams * sizes.stream_tokens:,}", "all"],
        ["server's processor time an event", f"{1e6 * used / max(1, events):.0f} µs ({events:,} events)", "≤ 250 µs"],
        ["server's processor time in all", f"{used:.1f} of {seconds:.1f} s", ""],
        ["between events of a stream, median and p99", _spread(gaps), ""],
        ["memory a connection", f"{1e3 * (peak - memory) / sizes.streams:.0f} KB", ""],
    ]
    head = (
        f"\n## {sizes.streams} streams at once\n\n{sizes.stream_tokens} tokens each, a step of {sizes.stream_step_ms:.0f} ms.\n\n"
    )
    return head + table(["", "measured", "mark"], rows)


async def _many(server: Server, count: int, tokens: int) -> list[Reply]:
    body = chat(tokens, stream_options={"include_usage": True})
    return await asyncio.gather(*(ask(server.port, CHAT, body) for _ in range(count)))


def overload(work: Path, sizes: Sizes) -> str:
    """Ten times too many requests."""
    capacity = sizes.slots / (sizes.answer * sizes.overload_step_ms / 1e3)
    best: list[float] = []
    loaded: list[float] = []
    refusals: list[float] = []
    health: list[float] = []
    kinds: collections.Counter[int] = collections.Counter()
    with stub(work, "overload", sizes.slots, sizes.waiting, sizes.overload_step_ms) as server:
        for _ in range(sizes.rounds):
            best.append(asyncio.run(_just_enough(server, sizes)))
            rate, replies, probes = asyncio.run(_too_many(server, sizes, 10 * capacity))
            loaded.append(rate)
            refusals += [reply.seconds for reply in replies if reply.status == 429]
            health += [probe.seconds for probe in probes]
            kinds.update(reply.status for reply in [*replies, *probes])
    ratio = statistics.median(after / before for before, after in zip(best, loaded, strict=True))
    rows = [
        ["tokens/s with just enough requests", f"{statistics.median(best):,.0f}", ""],
        ["tokens/s with ten times as many as it can answer", f"{statistics.median(loaded):,.0f} (x{ratio:.3f})", "≥ x0.97"],
        ["a refusal (429) takes, median and p99", _spread(refusals), "p99 ≤ 50 ms"],
        ["`/health` takes, median and p99", _spread(health), "p99 ≤ 100 ms"],
        ["answers by status", _statuses(kinds), "200 and 429"],
    ]
    head = (
        f"\n## Overload\n\n{sizes.slots} slots, {sizes.waiting} may wait, a step of {sizes.overload_step_ms:g} ms, {sizes.answer} "
        f"tokens an answer: {capacity:.0f} answers/s at most; {10 * capacity:.0f} requests/s for {sizes.seconds:g} s, "
        f"{sizes.rounds} rounds.\n\n"
    )
    return head + table(["", "measured", "mark"], rows)


async def _just_enough(server: Server, sizes: Sizes) -> float:
    """Tokens per second while as many requests are under way as may be."""
    end = time.monotonic() + sizes.seconds

    async def again_and_again() -> None:
        while time.monotonic() < end:
            await ask(server.port, CHAT, chat(sizes.answer))

    asking = [asyncio.create_task(again_and_again()) for _ in range(sizes.slots + sizes.waiting // 2)]
    rate = await _rate(server, sizes)
    await asyncio.gather(*asking)
    return rate


async def _rate(server: Server, sizes: Sizes) -> float:
    """Tokens per second by the server's own counter, without the first and the last part of the time."""
    await asyncio.sleep(0.25 * sizes.seconds)
    counts = []
    for pause in (0.6 * sizes.seconds, 0.0):
        counts.append((time.perf_counter(), (await asyncio.to_thread(server.metrics))["generation_tokens_total"]))
        await asyncio.sleep(pause)
    (begun, first), (ended, last) = counts
    return (last - first) / (ended - begun)


async def _too_many(server: Server, sizes: Sizes, a_second: float) -> tuple[float, list[Reply], list[Reply]]:
    """Tokens per second, all replies, and those of `/health`, while requests come at a rate of their own."""
    asked: list[asyncio.Task[Reply]] = []
    probes: list[Reply] = []
    begun = time.monotonic()

    async def ask_on() -> None:
        while (passed := time.monotonic() - begun) < sizes.seconds:
            asked.extend(
                asyncio.create_task(ask(server.port, CHAT, chat(sizes.answer))) for _ in range(int(passed * a_second) - len(asked))
            )
            await asyncio.sleep(0.005)

    async def probe() -> None:
        while time.monotonic() - begun < sizes.seconds:
            probes.append(await ask(server.port, "/health"))
            await asyncio.sleep(0.02)

    asking = asyncio.gather(ask_on(), probe())
    rate = await _rate(server, sizes)
    await asking
    return rate, list(await asyncio.gather(*asked)), probes


Kind = Callable[[Server, random.Random], Coroutine[Any, Any, tuple[Reply, set[int]]]]


async def _sent(server: Server, path: str, body: Any, expected: set[int], **more: Any) -> tuple[Reply, set[int]]:
    return await ask(server.port, path, body, **more), expected


async def _leaves(server: Server, draw: random.Random) -> tuple[Reply, set[int]]:
    """A client that is gone after a while, in whatever phase its request is then."""
    body = json.dumps(chat(200, stream=draw.random() < 0.5)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    data = head % len(body) + body
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(data[: draw.choice([len(data), len(data), draw.randrange(len(data))])])
    await asyncio.sleep(draw.uniform(0, 0.3))
    if draw.random() < 0.5:
        writer.transport.abort()
    writer.close()
    return Reply(), {0}


def _kinds() -> dict[str, tuple[float, Kind]]:
    def chats(body: Callable[[random.Random], dict[str, Any]], expected: set[int], **more: Any) -> Kind:
        return lambda server, draw: _sent(server, CHAT, body(draw), expected, **more)

    def prompts(length: Callable[[random.Random], int], expected: set[int]) -> Kind:
        return lambda server, draw: _sent(server, COMPLETIONS, {"prompt": [300] * length(draw), "max_tokens": 4}, expected)

    def either(draw: random.Random) -> bool:
        return draw.random() < 0.5

    return {
        "stream": (6, chats(lambda draw: chat(draw.randint(1, 60)), {200})),
        "whole": (4, chats(lambda draw: chat(draw.randint(1, 60), False), {200})),
        "stream left": (4, lambda server, draw: _sent(server, CHAT, chat(300), {200}, leave_after=draw.randint(1, 30))),
        "left at any moment": (4, _leaves),
        "several answers": (1, chats(lambda draw: chat(12, either(draw), n=draw.randint(2, 4)), {200})),
        "stop string": (2, chats(lambda draw: chat(80, either(draw), stop=["다" * draw.randint(1, 9)]), {200})),
        "log-probabilities": (1, chats(lambda draw: chat(8, either(draw), logprobs=True, top_logprobs=5), {200})),
        "a choice": (1, chats(lambda draw: chat(20, either(draw), structured_outputs={"choice": ["yes", "no"]}), {200})),
        "long prompt": (1, prompts(lambda draw: draw.randint(500, 1990), {200})),
        "too long": (1, prompts(lambda draw: draw.randint(2000, 5000), {400})),
        "wrong field": (1, chats(lambda draw: chat(4, temperature="hot"), {400})),
        "not JSON": (1, lambda server, draw: _sent(server, CHAT, b"\xff{" * draw.randint(1, 2000), {400})),
        "too late": (1, chats(lambda draw: chat(1900), {200, 504}, headers="X-Request-Timeout: 0.05\r\n")),
        "tokens": (1, lambda server, draw: _sent(server, "/tokenize", {"prompt": WORDS * draw.randint(1, 50)}, {200})),
        "metrics": (0.2, lambda server, draw: _sent(server, "/metrics", None, {200})),
    }


KINDS = _kinds()
"""What is asked in the soak: how often, how, and the statuses that it may have; 429 may come wherever the network is asked."""


def soak(work: Path, sizes: Sizes) -> str:
    """Requests of every kind for a long time."""
    counted: dict[str, collections.Counter[int]] = {kind: collections.Counter() for kind in KINDS}
    strange: list[str] = []
    memory: list[tuple[float, float]] = []
    with stub(work, "soak", sizes.slots, sizes.waiting, sizes.soak_step_ms) as server:
        asyncio.run(_soaking(server, sizes, counted, strange, memory))
        metrics = _at_rest(server)
        after = asyncio.run(_many(server, sizes.slots, 5))
        process = server.process
    said = json.loads((work / "soak.log").read_text().splitlines()[-1])
    settled = [point for point in memory if point[0] >= 0.2 * memory[-1][0]] if len(memory) > 10 else memory
    slope = statistics.linear_regression(*zip(*settled, strict=True)).slope * 60 if len(settled) > 1 else 0.0
    taken = said["taken"] - sizes.slots  # the last ones came after the metrics were read
    rows = [
        ["requests", f"{sum(sum(each.values()) for each in counted.values()):,}", ""],
        ["answers with a status that they must not have", f"{len(strange)}{''.join(f'; {each}' for each in strange[:3])}", "0"],
        ["answers taken, ended, open", f"{said['taken']:,}, {said['ended']:,}, {said['open']}", "equal, 0"],
        ["`request_success_total`, `e2e_request_latency_seconds_count`",
         f"{metrics['request_success_total']:,.0f}, {metrics['e2e_request_latency_seconds_count']:,.0f}", f"{taken:,}"],
        ["running, waiting by `/metrics`", f"{metrics['num_requests_running']:.0f}, {metrics['num_requests_waiting']:.0f}", "0, 0"],
        ["slots in use; that hold other tokens than believed", f"{said['slots_in_use']}, {said['slots_that_differ']}", "0, 0"],
        ["all slots answer afterwards", f"{sum(reply.done for reply in after)} of {sizes.slots}", "all"],
        ["exit code after SIGTERM", str(process.returncode), "0"],
        ["memory at the beginning and the end", f"{settled[0][1]:.0f} and {settled[-1][1]:.0f} MB", ""],
        ["memory's slope after the first fifth", f"{slope:+.2f} MB a minute", "flat"],
    ]  # fmt: skip
    kinds = [[kind, _statuses(each)] for kind, each in counted.items()]
    ends = ", ".join(f"{end} {count:,}" for end, count in sorted(said["by_end"].items()))
    head = f"\n## Soak\n\n{sizes.minutes:g} minutes, {sizes.soak_workers} clients, {sizes.slots} slots. Answers ended: {ends}.\n\n"
    return head + table(["", "measured", "mark"], rows) + "\n" + table(["asked", "answers by status"], kinds)


async def _soaking(
    server: Server,
    sizes: Sizes,
    counted: dict[str, collections.Counter[int]],
    strange: list[str],
    memory: list[tuple[float, float]],
) -> None:
    begun = time.monotonic()
    end = begun + 60 * sizes.minutes

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            kind = draw.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
            reply, expected = await KINDS[kind][1](server, draw)
            counted[kind][reply.status] += 1
            if reply.status not in expected | {429} or (reply.status == 200 and kind == "stream" and not reply.done):
                strange.append(f"{kind}: {reply.status} {reply.last[:80]!r}")
            if reply.status == 429:
                await asyncio.sleep(0.05)

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append((time.monotonic() - begun, server.resident_mb()))
            await asyncio.sleep(min(5.0, 6 * sizes.minutes))
        memory.append((time.monotonic() - begun, server.resident_mb()))

    await asyncio.gather(watch(), *(client(number) for number in range(sizes.soak_workers)))


def _at_rest(server: Server) -> dict[str, float]:
    """The counters when nothing is under way any more; after a while, whatever they are."""
    for _ in range(100):
        metrics = server.metrics()
        if metrics["num_requests_running"] + metrics["num_requests_waiting"] == 0:
            break
        time.sleep(0.05)
    return metrics


def _statuses(counts: collections.Counter[int]) -> str:
    return ", ".join(f"{status or 'left'}: {count:,}" for status, count in sorted(counts.items()))


def _spread(seconds: Sequence[float]) -> str:
    """The median and what 99 of 100 do not exceed."""
    return f"{1e3 * statistics.median(seconds):.1f} ms, {1e3 * part_of(seconds, 0.99):.1f} ms" if seconds else "none"


PARTS: dict[str, Callable[[Path, Sizes], str]] = {"streams": streams, "overload": overload, "soak": soak}


def main() -> None:
    """Run the parts, and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true", help="a few seconds of each, to see that it runs")
    given = parser.parse_args()
    unknown = set(given.parts.split(",")) - PARTS.keys()
    if unknown:
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}; use {', '.join(PARTS)}")
    end_gently()
    sizes = SMALL if given.small else Sizes()
    sizes = sizes if given.minutes is None else sizes._replace(minutes=given.minutes)
    if not (given.work / "tokenizer").is_dir():
        from benchmarks.generate_speed import small_tokenizer

        given.work.mkdir(parents=True, exist_ok=True)
        small_tokenizer(900, given.work / "tokenizer")
    page = heading("`keural serve` under load", ["uvicorn", "fastapi", "h11", "torch"])
    for part in given.parts.split(","):
        try:
            page += PARTS[part](given.work, sizes)
        except UserError as error:
            raise SystemExit(str(error)) from error
        if given.out is not None:
            given.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
