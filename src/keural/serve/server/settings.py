"""What a server is told when it is started, and what it takes for too much.

In: a command line. Out: values; nothing heavy is imported for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from keural.serve.jamo import Jamo


@dataclass(frozen=True)
class Limits:
    """What is too much, by default on. Times are in seconds, sizes in bytes."""

    waiting: int = 16
    """Requests in the queue."""
    deadline: float = 600.0
    """For a request, waiting included."""
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    header_bytes: int = 16 * 1024
    body_bytes: int = 1024 * 1024
    depth: int = 32
    """Lists and objects of JSON inside each other."""
    parts: int = 16 * 1024
    """Lists, objects and keys of JSON. What is wrong with each is found before anything is said: seconds for a million of them."""
    send_seconds: float = 30.0
    """In which a client takes something of what waits for it."""
    idle_seconds: float = 15.0
    """That a connection is kept without a request."""
    connections: int = 1024
    drain: float = 30.0
    """For answers under way after a signal to end."""


ELSEWHERE = ("vllm", "sglang")
"""Engines that are servers of their own."""
AT_ONCE, AT_ONCE_ELSEWHERE = 4, 256


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    host: str = "127.0.0.1"
    port: int = 8000
    engine: str | None = None
    """None takes what runs what the path holds."""
    slots: int | None = None
    """None takes what suits the engine; see `answers_at_once`."""
    name: str | None = None
    """Of the model; None takes that of its recipe, else of its directory."""
    system: str | None = None
    """System message of conversations that have none; None takes the one the model was saved with, an empty one is none."""
    jamo: Jamo = "compatibility"
    threads: int | None = None
    api_key_file: Path | None = None
    insecure: bool = False
    """Serve other machines without keys."""
    allow_hosts: Sequence[str] = ()
    metrics_prefix: str = "keural"
    limits: Limits = field(default_factory=Limits)
    upstream: Sequence[str] = ()
    """Addresses of servers that run elsewhere."""
    upstream_key_file: Path | None = None
    export: Path | None = None
    """Where the export for vLLM or SGLang lies or is made; None takes a place beside the model."""
    engine_arguments: str = ""
    """More of an engine's command line, as in a shell."""
    repetition_penalty: float | None = None
    """Of requests that give none; None takes the model's."""
    eager: bool = False
    """On a GPU: start the kernels of a step one by one, instead of all by a graph."""

    @property
    def answers_at_once(self) -> int:
        """The slots of a network, or the requests that servers elsewhere are given."""
        return self.slots or (AT_ONCE_ELSEWHERE if self.engine in ELSEWHERE else AT_ONCE)
