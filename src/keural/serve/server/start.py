"""What is looked at before a model is loaded, which may take minutes: `keural serve DIR`.

In: a path and settings. Out: the exit code. What cannot work is refused here, before torch or a web framework is imported.
"""

import importlib.util
import ipaddress
import re
import socket
from dataclasses import replace
from pathlib import Path

from keural.errors import UserError, nearest, quoted
from keural.serve.engines.registry import ENGINES, chat_defaults, find_engine
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.server.keys import Keys, read_keys
from keural.serve.server.settings import ELSEWHERE, Settings

NEEDED = ("fastapi", "uvicorn", "h11", "prometheus_client", "httpx")
"""Packages of the extra `serve`."""
BACKLOG = 2048
PREFIX = re.compile("[a-zA-Z_][a-zA-Z0-9_]{0,63}")
"""What the names of counters may begin with."""


def run_serve(path: Path, settings: Settings) -> int:
    """Serve the model in `path` until a signal ends it; returns the exit code.

    Raises:
        UserError: for what cannot work: no such engine or model, a package or a key that is missing, a port that is taken.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the server needs {', '.join(missing)}; install it with `pip install 'keural[serve]'`")
    if not PREFIX.fullmatch(settings.metrics_prefix):
        raise UserError("--metrics-prefix: a word of letters, digits and _ is needed, such as keural or vllm")
    _check_engine(settings)
    if settings.engine not in ELSEWHERE:
        engine, found = find_engine(path, settings.engine)
        defaults, system = chat_defaults(path, settings.engine)
    keys = read_keys(settings.api_key_file) if settings.api_key_file is not None else None
    with bind(settings.host, settings.port) as listener:
        _check_exposure(listener, keys, settings.insecure)
        _check_names(listener, settings)
        if settings.engine in ELSEWHERE:
            from keural.serve.server.fronting import serve_elsewhere

            return serve_elsewhere(path, settings, keys, listener)
        from keural.serve.server.running import serve

        return serve(engine, found, settings, *with_settings(defaults, system, settings), keys, listener)


def with_settings(defaults: SamplingParams, system: str | None, settings: Settings) -> tuple[SamplingParams, str | None]:
    """A model's own settings and system message, where the command line says nothing else."""
    if settings.repetition_penalty is not None:
        defaults = replace(defaults, repetition_penalty=settings.repetition_penalty)
    return defaults, system if settings.system is None else settings.system or None


def _check_engine(settings: Settings) -> None:
    """Raise `UserError` for an engine that there is not, and for options that mean nothing for the one that is asked for."""
    engine, known = settings.engine, (*ENGINES, *ELSEWHERE)
    if engine is not None and engine not in known:
        raise UserError(f"unknown engine {quoted(engine)}{nearest(engine, known)}; use one of {', '.join(known)}")
    if settings.upstream and engine not in ELSEWHERE:
        raise UserError("--upstream: say what kind of servers these are, with --engine vllm or --engine sglang")
    own = engine in ELSEWHERE and not settings.upstream
    given = {
        "--upstream-key-file": settings.upstream_key_file is not None and not settings.upstream,
        "--export": settings.export is not None and not own,
        "--engine-args": bool(settings.engine_arguments) and not own,
        "--threads": settings.threads is not None and engine in ELSEWHERE,
        "--eager": settings.eager and engine in ELSEWHERE,
    }
    if wrong := [option for option, meaningless in given.items() if meaningless]:
        raise UserError(f"{', '.join(wrong)}: means nothing for this engine; leave it out")


def bind(host: str, port: int) -> socket.socket:
    """A socket for the server. Raises `UserError` where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"--host {host}: there is no such address; use 127.0.0.1, or 0.0.0.0 for other machines") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UserError(f"port {port} on {host} cannot be used ({error.strerror}); choose another one with --port") from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _check_exposure(listener: socket.socket, keys: Keys | None, insecure: bool) -> None:
    if keys is None and not insecure and not is_loopback(listener):
        raise UserError(
            "other machines can reach this address: give --api-key-file FILE, a key on each line, or --insecure to let everybody in"
        )


def _check_names(listener: socket.socket, settings: Settings) -> None:
    """Raise `UserError` for names of a server that may be called by any."""
    if settings.allow_hosts and not is_loopback(listener):
        raise UserError("--allow-host: means nothing where other machines can reach the server, by whatever name; leave it out")
