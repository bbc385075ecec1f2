"""What runs a model: the interface that chat and server use, and the engines by name.

In: a path, perhaps the name of an engine. Out: an `Engine`. An engine's libraries are imported when it is opened, not before.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from keural.convert.hf import model_directory
from keural.convert.lineage import read_record
from keural.errors import UserError, nearest
from keural.serve.decoding import Finish
from keural.serve.sampling import Sampling
from keural.tokenizer import KeuralTokenizer


class Engine(Protocol):
    """Something that continues token ids."""

    tokenizer: KeuralTokenizer
    context_length: int
    """Tokens of prompt and answer together."""

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling, stop: Collection[int]) -> Generator[int, None, Finish]:
        """Yield the answer's ids without the stop token, then return why it ended; closing the generator cancels.

        Raises `UserError` when the prompt leaves no room for an answer.
        """


@dataclass(frozen=True)
class EngineKind:
    """An engine that can be asked for by name."""

    suits: Callable[[Path], bool]
    """Whether a path looks like something it runs."""
    find: Callable[[Path], Path]
    """What it would run of a path: a directory or a file. Raises `UserError`, saying what to do, when there is nothing for it."""
    open: Callable[[Path, int | None], Engine]
    """Loads what `find` gave, to run on so many threads; None leaves the number to the engine. Raises `UserError`."""


def open_engine(path: Path, name: str | None = None, threads: int | None = None) -> Engine:
    """Load the model in `path`.

    Args:
        path: a model directory, a GGUF file, or the directory with one.
        name: of `ENGINES`; None takes the one that runs what the path holds.
        threads: to compute with; None takes what the engine thinks best.

    Raises:
        UserError: when the engine is unknown, not installed or does not run what is there, or the files are damaged.
    """
    kind, found = _find(path, name)
    return kind.open(found, threads)


def chat_defaults(path: Path, name: str | None = None) -> tuple[Sampling, str | None]:
    """Sampling settings and system message that a model was saved with; the card's and none where it says nothing.

    Arguments and errors as for `open_engine`.
    """
    _, found = _find(path, name)
    chat = read_record(found if found.is_dir() else found.parent).get("chat") or {}
    known = {name: chat[name] for name in ("temperature", "top_p", "repetition_penalty", "max_new_tokens") if name in chat}
    return replace(Sampling(), **known), chat.get("system")


def gguf_file(path: Path) -> Path:
    """The GGUF file that `path` stands for: itself, or the only one in the directory. Raises `UserError` when there is none."""
    found = _gguf_files(path)
    if len(found) == 1:
        return found[0].resolve()
    if found:
        raise UserError(f"{path}: holds {len(found)} GGUF files ({', '.join(file.name for file in found)}); name one of them")
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; give a GGUF file or the directory with one")
    raise UserError(f"{path}: holds no GGUF file; make one with `keural export {path} OUT --format gguf`")


def _gguf_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.gguf"))
    return [path] if path.is_file() and path.suffix == ".gguf" else []


def _looks_like_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" or bool(_gguf_files(path))


def _transformers_directory(path: Path) -> Path:
    """The model directory that `path` stands for, with advice where a GGUF file stands instead."""
    if not _is_model_directory(path) and _gguf_files(path):
        raise UserError(
            f"{path}: is GGUF, which the transformers engine does not run; use --engine llama.cpp, or give the model directory "
            "it was exported from"
        )
    return model_directory(path)


def _is_model_directory(path: Path) -> bool:
    try:
        model_directory(path)
    except UserError:
        return False
    return True


def _open_transformers(path: Path, threads: int | None) -> Engine:
    from keural.serve.transformers_engine import TransformersEngine

    return TransformersEngine(path, threads=threads)


def _open_llama(path: Path, threads: int | None) -> Engine:
    try:
        from keural.serve.llama_engine import LlamaCppEngine
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise UserError("the llama.cpp engine is not installed; install it with `pip install 'keural[llama]'`") from error
    return LlamaCppEngine(path, threads=threads)


ENGINES: dict[str, EngineKind] = {
    "transformers": EngineKind(_is_model_directory, _transformers_directory, _open_transformers),
    "llama.cpp": EngineKind(_looks_like_gguf, gguf_file, _open_llama),
}
"""By name; where a path suits several, the first is the default."""


def _find(path: Path, name: str | None) -> tuple[EngineKind, Path]:
    """The engine of that name, or the first that the path suits, and what it runs of the path."""
    if name is None:
        name = next((name for name, kind in ENGINES.items() if kind.suits(path)), next(iter(ENGINES)))
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}{nearest(name, ENGINES)}; use one of {', '.join(ENGINES)}")
    return ENGINES[name], ENGINES[name].find(path)
