"""One optimizer step's losses and gradients on several ranks, in processes of their own.

In: what `small_job` takes, and the ways to compute it. Out: for each way what `step_gradients` gives, with whole gradients.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from keural.train.optimization.optimizer import gradient_norm
from keural.train.processes.parallel import reshard
from keural.train.processes.ranks import Ranks, session
from keural.train.stage import building
from keural.train.stage.signals import StopSignals
from keural.train.stage.training import open_stage
from keural.train.trainer import Trainer
from tests.helpers.rendezvous import rendezvous
from tests.helpers.train_small import small_job, step_gradients

Ways = dict[str, dict[str, Any]]
"""Settings of `train` by name."""
Found = dict[str, dict[str, torch.Tensor]]
"""By the name of the way: gradients, `loss`, other losses, and `gradient_norm`."""


def on_ranks(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(*arguments)` in `world` processes with torchrun's environment; all must end well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.train_small", __name__])
    with rendezvous(world) as environments:
        processes = [context.Process(target=_on_rank, args=(environment, work, arguments)) for environment in environments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(280)
    assert [process.exitcode for process in processes] == [0] * world


def _on_rank(environment: dict[str, str], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    work(*arguments)


@contextlib.contextmanager
def always_by_engine() -> Iterator[None]:
    """The engine computes whatever the recipe says."""
    original = building._has_engine
    building._has_engine = lambda stage, ranks: True
    try:
        yield
    finally:
        building._has_engine = original


def open_ways(directory: Path, ranks: Ranks, ways: Ways, **changes: Any) -> Iterator[tuple[str, Trainer]]:
    """The first step of a small job in each way, by the engine."""
    train = changes.pop("train", {})
    for name, way in ways.items():
        run = f"{name}-{ranks.world}"
        if ranks.is_main:
            small_job(directory, run=run, train=train | way, **changes)
        ranks.barrier()
        job = small_job(directory, run=run, train=train | way, **changes)
        with always_by_engine():
            yield name, open_stage(job, ranks, StopSignals(ranks.world), time.monotonic()).trainer


def gradients_by(directory: Path, ranks: Ranks, ways: Ways, **changes: Any) -> Found:
    """Losses and whole gradients of a job's first step in each way; every rank must call it."""
    found: Found = {}
    for name, trainer in open_ways(directory, ranks, ways, **changes):
        losses, gradients = step_gradients(trainer)
        norm = gradient_norm(list(trainer.policy.parameters()))
        whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in gradients.items()}
        found[name] = {**losses, **whole, "gradient_norm": norm}
        reshard(trainer.policy)
    return found


def save_gradients(directory: str, out: str, ways: Ways, changes: dict[str, Any]) -> None:
    """Write what `gradients_by` gives on these ranks to a file."""
    with session() as ranks:
        found = gradients_by(Path(directory), ranks, ways, **changes)
        if ranks.is_main:
            torch.save(found, out)
