"""What runs a model: the interface that chat and server use, and the engines by name.

In: a path, perhaps the name of an engine. Out: an `Engine`. An engine's libraries are imported when it is opened, not before.
"""

import os
from dataclasses import replace
from pathlib import Path

from keural.card import SamplingDefaults
from keural.errors import UserError, nearest, quoted
from keural.limits import EVERY_MACHINES_THREADS
from keural.pretrained.lineage import read_record, suggestions_of
from keural.serve.engines.base import Engine, EngineKind
from keural.serve.engines.paths import gguf_file, is_model_directory, looks_like_gguf, transformers_directory
from keural.serve.engines.sampling_params import SamplingParams


def open_engine(path: Path, name: str | None = None, threads: int | None = None) -> Engine:
    """Load the model in `path`.

    Args:
        path: a model directory, a GGUF file, or the directory with one.
        name: of `ENGINES`; None takes the one that runs what the path holds.
        threads: to compute with; None takes what the engine thinks best.

    Raises:
        UserError: when the engine is unknown, not installed or does not run what is there, or the files are damaged.
    """
    most = max(EVERY_MACHINES_THREADS, 2 * (os.cpu_count() or 1))
    if threads is not None and not 1 <= threads <= most:
        raise UserError(f"{quoted(threads)} threads: this machine has {os.cpu_count()} processors; give a number from 1 to {most}")
    kind, found = _find(path, name)
    return kind.open(found, threads)


def chat_defaults(path: Path, name: str | None = None) -> tuple[SamplingParams, str | None]:
    """Sampling settings and system message that a model was saved with; the card's and none where it says nothing.

    Arguments and errors as for `open_engine`.
    """
    _, found = _find(path, name)
    return saved_defaults(found if found.is_dir() else found.parent)


def saved_defaults(directory: Path) -> tuple[SamplingParams, str | None]:
    """Sampling settings and system message in a directory's record; the card's and none where it says nothing."""
    chat = read_record(directory).get("chat") or {}
    known = {name: chat[name] for name in SamplingDefaults._fields if name in chat}
    return replace(SamplingParams(), **known), chat.get("system")


def suggestions(path: Path, name: str | None = None) -> list[str]:
    """Things to ask that a model was saved with. Arguments and errors as for `open_engine`."""
    _, found = _find(path, name)
    return suggestions_of(found if found.is_dir() else found.parent)


def _open_transformers(path: Path, threads: int | None) -> Engine:
    from keural.serve.engines.transformers import TransformersEngine

    return TransformersEngine(path, threads=threads)


def _open_llama(path: Path, threads: int | None) -> Engine:
    try:
        from keural.serve.engines.llama_cpp import LlamaCppEngine
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise UserError("the llama.cpp engine is not installed; install it with `pip install 'keural[llama]'`") from error
    return LlamaCppEngine(path, threads=threads)


ENGINES: dict[str, EngineKind] = {
    "transformers": EngineKind(is_model_directory, transformers_directory, _open_transformers),
    "llama.cpp": EngineKind(looks_like_gguf, gguf_file, _open_llama),
}
"""By name; where a path suits several, the first is the default."""


def _find(path: Path, name: str | None) -> tuple[EngineKind, Path]:
    """The engine of that name, or the first that the path suits, and what it runs of the path."""
    name, found = find_engine(path, name)
    return ENGINES[name], found


def find_engine(path: Path, name: str | None) -> tuple[str, Path]:
    """The name of the engine that is asked for, or of the first that the path suits, and what it runs of the path.

    Raises `UserError` where there is no such engine, or nothing for it.
    """
    if name is None:
        name = next((name for name, kind in ENGINES.items() if kind.suits(path)), next(iter(ENGINES)))
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}{nearest(name, ENGINES)}; use one of {', '.join(ENGINES)}")
    return name, ENGINES[name].find(path)
