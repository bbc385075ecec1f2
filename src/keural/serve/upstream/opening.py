"""Servers elsewhere, from the command line to the first request and from the last one to their end.

In: addresses, or an export and how an engine is started. Out: `Upstreams`, looked at and looked after.
"""

import asyncio
import contextlib
import re
import secrets
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx

from keural.errors import UserError, quoted
from keural.files import read_text
from keural.serve.batching.requests import Request
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.upstream.child import Child, Log, free_port
from keural.serve.upstream.client import Server
from keural.serve.upstream.contract import Contract, Facts, Failed, Later
from keural.serve.upstream.models import FrontModel
from keural.serve.upstream.runner import Upstreams
from keural.serve.upstream.sglang import SGLANG
from keural.serve.upstream.vllm import VLLM
from keural.serve.upstream.watch import Died, await_health, watch
from keural.terminal import note

CONTRACTS = {contract.name: contract for contract in (VLLM, SGLANG)}
MOST_UPSTREAMS = 64
LAST_LINES_SHOWN = 3


def addresses(texts: Sequence[str]) -> list[str]:
    """The addresses of servers, some perhaps in one text with commas between. Raises `UserError` for what is none."""
    found = [part.strip().rstrip("/") for text in texts for part in text.split(",") if part.strip()]
    for address in found:
        try:
            url = httpx.URL(address)
        except (httpx.InvalidURL, ValueError):
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
            raise UserError(f"--upstream {quoted(address)}: is no address of a server, such as http://10.0.0.7:8000")
    if len(set(found)) < len(found):
        raise UserError("--upstream: names a server twice")
    if not 0 < len(found) <= MOST_UPSTREAMS:
        raise UserError(
            f"--upstream: names {len(found)} servers; from 1 to {MOST_UPSTREAMS} can be fronted, for more see docs/serving.md"
        )
    return found


def read_key(file: Path) -> str:
    """The key in a file. Raises `UserError` where there is none, or several."""
    lines = [line.strip() for line in read_text(file).splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if len(keys) != 1 or not (keys[0].isascii() and keys[0].isprintable() and " " not in keys[0]):
        raise UserError(f"{file}: must hold one key, of letters, digits and signs, for all servers of --upstream")
    return keys[0]


@contextlib.contextmanager
def remote(
    contract: Contract, urls: Sequence[str], key: str | None, model: FrontModel, name: str, count: int, log: Log
) -> Iterator[Upstreams]:
    """Servers that run already. Raises `UserError` where one serves another model, or none can be reached."""
    servers = [Server(url, contract, key) for url in urls]
    with _running(servers, model, name, count, log) as found:
        reached = found.do(_look_at_all(found)).result()
        if not reached:
            raise UserError("; ".join(f"{server.url} {server.trouble}" for server in servers))
        for server in servers:
            if server.trouble is not None:
                note(f"({server.url} {server.trouble}; it is used as soon as it answers)")
        yield _attended(found)


@contextlib.contextmanager
def own(
    contract: Contract, export: Path, more: Sequence[str], model: FrontModel, name: str, count: int, log: Log
) -> Iterator[Upstreams]:
    """An engine as a process of ours. Raises `UserError` where it is not installed or does not come to answer."""
    port, key = free_port(), secrets.token_hex(24)
    child = Child(contract.launch(export, name, port, key, more), log)
    server = Server(f"http://127.0.0.1:{port}", contract, key, child)
    with _running([server], model, name, count, log) as found, _a_signal_ends():
        note(f"({contract.name} is starting on {export})")
        found.do(_start(found, server, child)).result()
        yield _attended(found)


@contextlib.contextmanager
def _running(servers: Sequence[Server], model: FrontModel, name: str, count: int, log: Log) -> Iterator[Upstreams]:
    """Servers in a loop of their own; whatever happens inside, the loop and every engine end with the block."""
    found = Upstreams(servers, name, model.tokenizer.vocab_size, count, model.context_length, log)
    try:
        yield found
    finally:
        found.stop(_end(found))


async def _end(found: Upstreams) -> None:
    """Stop looking after servers, end engines, give connections back."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for server in found.servers:
        if server.child is not None:
            await server.child.stop()
        await server.close()


def _attended(found: Upstreams) -> Upstreams:
    """The same, with somebody who looks after the servers."""
    for server in found.servers:
        found.do(watch(server, found))
    return found


async def _look_at_all(found: Upstreams) -> bool:
    """Look at every server at once; gives whether one can be reached. Raises `UserError` for one of another model."""
    looks = await asyncio.gather(*(_look_at(server, found) for server in found.servers))
    lengths = [facts.context_length for facts in looks if facts is not None]
    found.context_length = min(lengths, default=found.context_length)
    return bool(lengths)


async def _look_at(server: Server, found: Upstreams) -> Facts | None:
    try:
        server.facts = await server.look(found.model, found.vocab_size, found.context_length)
    except Later as error:
        server.trouble = str(error)
        return None
    except Failed as error:
        raise UserError(f"{server.url} {error}{f' ({error.said})' if error.said else ''}") from error
    server.trouble = None
    return server.facts


async def _start(found: Upstreams, server: Server, child: Child) -> None:
    """Start an engine and wait until it answers. Raises `UserError`."""
    try:
        await child.start()
        await await_health(server, child, note)
    except Died as error:
        last = _last_words(await child.said())
        raise UserError(
            f"{server.contract.name} {error} before it answered{f': {last}' if last else ', without a word'}"
        ) from error
    except Failed as error:
        raise UserError(f"{server.contract.name} {error}") from error
    except OSError as error:
        raise UserError(f"{server.contract.name} cannot be started ({error.strerror})") from error
    facts = await _look_at(server, found)
    if facts is None:
        raise UserError(f"{server.contract.name} {server.trouble}")
    found.context_length = facts.context_length


def _last_words(lines: Sequence[str]) -> str:
    """The last of the lines that names an error, else the last ones."""
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b", line)]
    return " / ".join(errors[-1:] or lines[-LAST_LINES_SHOWN:])


def check_defaults(found: Upstreams, defaults: SamplingParams) -> None:
    """Raise `UserError` where requests that say nothing would ask for what the servers cannot keep."""
    unhonoured = found.unhonoured(Request([0], defaults))
    if unhonoured is not None:
        raise UserError(f"the model's own {unhonoured.param} cannot be kept: {unhonoured.why}")


@contextlib.contextmanager
def _a_signal_ends() -> Iterator[None]:
    """SIGTERM ends the block as an error does, until somebody else takes the signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
