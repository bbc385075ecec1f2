"""A server that runs until it is told to end.

In: a model's directory, settings, a socket. Out: the exit code.
"""

import asyncio
import functools
import gc
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import uvicorn

from keural.errors import UserError
from keural.model import KeuralMoECausalLM
from keural.pretrained.cached_step import check_cached_step
from keural.pretrained.lineage import read_record, suggestions_of, trained_on_tools
from keural.pretrained.network_code import other_code_line
from keural.pretrained.stored_model import build, open_model
from keural.serve.batching.graphed_slots import GraphedSlots, can_be_graphed
from keural.serve.batching.slots import Slots
from keural.serve.batching.transformers_slots import TransformersSlots
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.server.app import make_app
from keural.serve.server.gate import refused_before
from keural.serve.server.keys import Keys, read_keys
from keural.serve.server.log import set_up_logging, write_entry
from keural.serve.server.protocol import guarded_protocol
from keural.serve.server.service import Service
from keural.serve.server.settings import Settings
from keural.serve.server.start import BACKLOG, is_loopback
from keural.serve.server.supervisor import tell, watchdog
from keural.serve.upstream.runner import Upstreams
from keural.terminal import note, say
from keural.tokenizer import KeuralTokenizer

AFTER_DRAIN = 5
"""Seconds in which clients take what is left of their answers after the last one has ended."""


class Loaded(NamedTuple):
    """A network with its tokenizer."""

    slots: Slots
    tokenizer: KeuralTokenizer
    unverified: str | None
    """One line for the user where not all that was read could be compared with checksums."""


def load_transformers(path: Path, slots: int, threads: int | None, eager: bool = False) -> Loaded:
    """The network of this package: on the GPU where there is one, in its weights' dtype, else in float32. Raises `UserError`."""
    if threads is not None:
        torch.set_num_threads(threads)
    on_gpu = torch.cuda.is_available()
    if eager and not on_gpu:
        raise UserError("--eager: torch finds no GPU here, and without one there are no graphs; leave it out")
    stored = open_model(path)
    try:
        model = build(stored, None).to("cuda") if on_gpu else build(stored)
        check_cached_step(model, stored.directory)
        made = _slots_on_gpu(model, slots, eager) if on_gpu else TransformersSlots(model, slots)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{path}: the GPU's memory is not enough; free some, give fewer --slots, or take a larger GPU") from error
    return Loaded(made, stored.tokenizer, stored.notice)


def _slots_on_gpu(model: KeuralMoECausalLM, slots: int, eager: bool) -> TransformersSlots:
    """Slots whose steps are graphs, where they can be and nobody wants otherwise. Raises `UserError`."""
    if eager:
        return TransformersSlots(model, slots)
    if not can_be_graphed(model):
        note(
            "(this model's positions change with an answer's length: its steps are no CUDA graphs, and take several times as long)"
        )
        return TransformersSlots(model, slots)
    graphed = GraphedSlots(model, slots)
    note("(the network's step is compiled; --eager does without, at several times the time for a token)")
    graphed.prepare()
    return graphed


def load_llama(path: Path, slots: int, threads: int | None, eager: bool = False) -> Loaded:
    """A GGUF file in llama.cpp. Raises `UserError`."""
    if eager:
        raise UserError("--eager: means nothing for this engine; leave it out")
    try:
        from keural.serve.batching.llama_slots import LlamaSlots
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise UserError("the llama.cpp engine is not installed; install it with `pip install 'keural[llama]'`") from error
    torch.set_num_threads(1)  # for the sampler alone: its threads would take the cores from llama.cpp's, and wait for them
    loaded = LlamaSlots(path, slots, threads)
    return Loaded(loaded, loaded.tokenizer, loaded.unverified)


LOADERS: dict[str, Callable[[Path, int, int | None, bool], Loaded]] = {"transformers": load_transformers, "llama.cpp": load_llama}
"""By engine: loads a path with so many slots, to run on so many threads, without graphs or with them."""


def serve(
    engine: str,
    path: Path,
    settings: Settings,
    defaults: SamplingParams,
    system: str | None,
    keys: Keys | None,
    listener: socket.socket,
) -> int:
    """Load a model and answer at `listener` until a signal ends it; returns the exit code. Raises `UserError`."""
    loaded = LOADERS[engine](path, settings.answers_at_once, settings.threads, settings.eager)
    for remark in (loaded.unverified, other_code_line(path)):
        if remark is not None:
            note(f"({remark})")
    return answer(loaded.slots, loaded.tokenizer, path, settings, defaults, system, keys, listener)


def answer(
    slots: Slots | Upstreams,
    tokenizer: KeuralTokenizer,
    path: Path,
    settings: Settings,
    defaults: SamplingParams,
    system: str | None,
    keys: Keys | None,
    listener: socket.socket,
) -> int:
    """Answer for the model at `path` until a signal ends it; returns the exit code."""
    service = service_for(slots, tokenizer, path, settings, defaults, system, keys, host_names(listener, settings))
    set_up_logging()
    allow_files(2 * settings.limits.connections)
    server = Server(service, listener, settings.api_key_file)
    keep_loaded()
    server.run(sockets=[listener])
    return 0


def keep_loaded() -> None:
    """Let Python's collector pass over what there is now, for good: to go through all that was loaded takes a tenth of a second
    and more, in which nobody is answered.
    """
    gc.collect()
    gc.freeze()


def service_for(
    slots: Slots | Upstreams,
    tokenizer: KeuralTokenizer,
    path: Path,
    settings: Settings,
    defaults: SamplingParams,
    system: str | None = None,
    keys: Keys | None = None,
    hosts: frozenset[str] | None = None,
) -> Service:
    """The service of the model at `path`, a directory or a file in it."""
    directory = path if path.is_dir() else path.parent
    to_ask = suggestions_of(directory)
    return Service(
        tokenizer,
        slots,
        settings.name or name_of(path),
        defaults,
        system,
        settings.jamo,
        settings.limits,
        keys,
        hosts,
        facts={"suggestions": to_ask} if to_ask else {},
        trained_on_tools=trained_on_tools(read_record(directory)),
        metrics_prefix=settings.metrics_prefix,
        log=write_entry,
    )


def allow_files(count: int) -> None:
    """Let the process open so many files and connections, as far as its limits can be raised."""
    try:
        import resource
    except ModuleNotFoundError:  # not a Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def name_of(path: Path) -> str:
    """What a model is called: as its recipe, else as its directory."""
    recipe = read_record(path if path.is_dir() else path.parent).get("recipe")
    return recipe if isinstance(recipe, str) and recipe else path.resolve().name


def host_names(listener: socket.socket, settings: Settings) -> frozenset[str] | None:
    """Names by which a server on loopback may be called: a page from elsewhere must not reach it under a name of its own."""
    if not is_loopback(listener):
        return None
    return frozenset({"localhost", "127.0.0.1", "[::1]", listener.getsockname()[0], *map(str.lower, settings.allow_hosts)})


class Server(uvicorn.Server):
    """uvicorn that ends gently: at the first signal what runs may end, at the second the process does."""

    def __init__(self, service: Service, listener: socket.socket, key_file: Path | None = None) -> None:
        limits = service.limits
        config: dict[str, Any] = {
            "http": guarded_protocol(limits, functools.partial(refused_before, service)),
            "loop": "asyncio",
            "ws": "none",
            "lifespan": "off",
            "log_config": None,
            "access_log": False,
            "server_header": False,
            "proxy_headers": False,
            "backlog": BACKLOG,
            "timeout_keep_alive": limits.idle_seconds,
            "timeout_graceful_shutdown": AFTER_DRAIN,
        }
        super().__init__(uvicorn.Config(make_app(service), **config))
        self._key_file = key_file
        self._service, self._address = service, listener.getsockname()
        self._draining: asyncio.Task[None] | None = None
        service.connections = lambda: len(self.server_state.connections)
        self._watchdog = watchdog(service.trouble)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        self._service.answers.start()
        if self._key_file is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._read_keys_again, self._key_file)
        elif threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)
        await super().startup(sockets)
        host, port = self._address[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        slots = self._service.slots
        say(f"{self._service.name} on {where}/v1 ({slots.count} answers at once, context {slots.context_length}; Ctrl-C ends it)")
        everywhere = ipaddress.ip_address(host.partition("%")[0]).is_unspecified
        say(f"in a browser: {f'http://localhost:{port}' if everywhere else where}/")
        tell("READY=1")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to end has come."""
        if self._service.draining:
            os._exit(128 + sig)
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._service.draining and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        self._watchdog(counter)
        return await super().on_tick(counter)

    def _hang_up(self) -> None:
        """The terminal is gone, as SIGHUP says, which may come more than once."""
        self._service.draining = True

    def _read_keys_again(self, file: Path) -> None:
        """The file of keys was changed, as SIGHUP says; where it cannot be read, the old ones hold."""
        try:
            self._service.keys = read_keys(file)
        except UserError as error:
            write_entry({"event": "keys", "error": str(error)})
        else:
            write_entry({"event": "keys"})

    async def _drain(self) -> None:
        """Let answers under way end; new requests are turned away, and `/ready` says no."""
        write_entry({"event": "draining", "answers": self._service.answers.open})
        tell("STOPPING=1")
        await self._service.answers.close(self._service.limits.drain)
        self.should_exit = True
