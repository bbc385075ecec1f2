"""A model of a few thousand weights, stores of random sequences, and jobs on them: small enough to train in a second.

Run as a program it trains the job that a JSON file describes: `torchrun ... -m tests.helpers.train_small spec.json`.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from keural.data.loading.batch import Batch
from keural.data.loading.stream import Stream
from keural.data.tokens.store import LABELS, StoreWriter
from keural.errors import UserError
from keural.files import atomic_directory
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.recipe import StageSpec
from keural.train.gradients import accumulate_gradients
from keural.train.processes.parallel import reshard
from keural.train.processes.ranks import Ranks, session
from keural.train.stage.job import StageJob, StageResult
from keural.train.stage.run import StageRun
from keural.train.stage.signals import StopSignals
from keural.train.stage.training import open_stage, train_stage
from keural.train.trainer import Trainer
from tests.helpers.shapes import SMALL

VOCAB = 96
LENGTH = 32
END = VOCAB - 1
"""Ends a turn, as the network's configuration says."""
SHA = "0" * 64
KIND = {"next_token": "documents", "sft": "conversations", "dpo": "pairs", "kto": "answers"}


def small_config(**changes: Any) -> KeuralConfig:
    return KeuralConfig(**(SMALL | {"vocab_size": VOCAB, "sliding_window": 8, "max_position_embeddings": 64} | changes))


def random_model(seed: int = 0, scale: float = 1.0, **changes: Any) -> KeuralMoECausalLM:
    config = small_config(**changes)
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = KeuralMoECausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def write_store(
    directory: Path, objective: str, number: int, seed: int = 0, longest: int = LENGTH // 2, good: Sequence[int] | None = None
) -> Path:
    """`number` documents, conversations, pairs or labelled answers of a learnable kind: each token is mostly its predecessor plus a
    constant. Answers end with the token that ends a turn. `good` are the labels of answers, drawn where they are not given.
    """
    draw = np.random.default_rng(seed)
    asked: list[np.ndarray] = []
    given: list[np.ndarray] = []
    with atomic_directory(directory) as path, StoreWriter(path, SHA, VOCAB, KIND[objective]) as writer:  # type: ignore[arg-type]
        for _ in range(number):
            if objective == "dpo":
                prompt = sequence(draw, int(draw.integers(2, longest // 2)), 3)
                for slope in (3, 5):
                    answer = sequence(draw, int(draw.integers(2, longest // 2)), slope)
                    answer[-1] = END
                    mask = np.concatenate([np.zeros(len(prompt), int), np.ones(len(answer), int)])
                    writer.add(np.concatenate([prompt, answer]), mask)
            elif objective == "kto":
                asked.append(sequence(draw, int(draw.integers(2, longest // 2)), 3))
                given.append(sequence(draw, int(draw.integers(2, longest // 2)), 3 if draw.random() < 0.5 else 5))
                given[-1][-1] = END
            else:
                tokens = sequence(draw, int(draw.integers(3, longest)), 3)
                writer.add(tokens, answers(tokens, draw.integers(0, 2, len(tokens))) if objective == "sft" else None)
        if objective == "kto":
            write_answers(writer, asked, given, draw.integers(0, 2, number).tolist() if good is None else good)
    return directory


def write_answers(writer: StoreWriter, asked: list[np.ndarray], given: list[np.ndarray], good: Sequence[int]) -> None:
    """Labelled answers, each also with the prompt of the next one, and their labels."""
    for prompt, *answered in zip(asked, given, [given[-1], *given[:-1]], strict=True):
        for answer in answered:
            writer.add(np.concatenate([prompt, answer]), [0] * len(prompt) + [1] * len(answer))
    (writer.directory / LABELS).write_bytes(bytes(good))
    writer.close(extra=[LABELS])


def answers(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mask, its last token trained; every run of trained tokens is made to end with the end of a turn."""
    mask[-1] = 1
    tokens[(mask == 1) & (np.append(mask[1:], 0) == 0)] = END
    return mask


def sequence(draw: np.random.Generator, length: int, slope: int) -> np.ndarray:
    tokens = (int(draw.integers(4, VOCAB)) + slope * np.arange(length)) % (VOCAB - 4) + 4
    noise = draw.random(length) < 0.2
    tokens[noise] = draw.integers(4, VOCAB, int(noise.sum()))
    return tokens


def small_stage(objective: str = "next_token", **changes: Any) -> StageSpec:
    """A stage with settings for `train`, `router` and `dpo` given as dictionaries."""
    batch = {"dpo": {"batch_pairs": 4}, "kto": {"batch_answers": 8}}.get(objective, {"batch_tokens": 8 * LENGTH})
    train = {"steps": 12, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2, "save_every": 4, **batch} | changes.pop("train", {})
    data = {"sources": [{"name": "none", "adapter": "text"}], "sequence_length": LENGTH}
    init = {"init_from": "x/y"} if objective in ("dpo", "kto") or "lora" in changes else {}
    train = {name: value for name, value in train.items() if value is not None}
    return StageSpec.model_validate({"name": "small", "objective": objective, "data": data, "train": train, **init, **changes})


def small_job(
    directory: Path, objective: str = "next_token", *, number: int = 60, heldout: bool = False, layers: int = 2, **changes: Any
) -> StageJob:
    """A job in `directory`; its stores and initial model are made on the first call."""
    store, held, init = directory / "store", directory / "heldout", directory / "init"
    if not store.exists():
        write_store(store, objective, number)
        write_store(held, objective, 10, seed=1)
    if objective != "next_token" and not init.exists():
        random_model(seed=7, scale=3.0).save_pretrained(init)
    job: dict[str, Any] = {"fingerprint": "f" * 64}
    job |= {key: changes.pop(key) for key in ("budget_seconds", "boards", "fingerprint") if key in changes}
    run_dir = directory / str(changes.pop("run", "run"))
    run_dir.mkdir(exist_ok=True)
    return StageJob(
        stage=small_stage(objective, **changes),
        seed=11,
        model_config=small_config(num_hidden_layers=layers),
        init=None if objective == "next_token" else init,
        train_store=store,
        heldout_store=held if heldout else None,
        tokenizer_sha=SHA,
        run_dir=run_dir,
        **job,
    )


def open_run(job: StageJob) -> StageRun:
    """The stage with its model, plan and references, before the first step."""
    return open_stage(job, Ranks(0, 1, torch.device("cpu")), StopSignals(), time.monotonic())


def step_gradients(trainer: Trainer, step: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Everything that the losses of one optimizer step are made of, and its gradients, without the step."""
    found = accumulate_gradients(trainer, step)
    router = {name: getattr(found.router, name) for name in ("counts", "probabilities", "squares")}
    losses = {name: torch.tensor(value) for name, value in {"loss": found.loss, **found.metrics}.items()} | router
    named = trainer.policy.model.named_parameters()
    gradients = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
    return losses, gradients


def metrics_of(job: StageJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]


def losses_of(job: StageJob) -> list[float]:
    return [line["loss"] for line in metrics_of(job) if "loss" in line]


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """All weights, whole and on the CPU, on rank 0; None on the other ranks. Every rank must call it.

    A tied head, being the embedding again, is left out.
    """
    reshard(model)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if is_main:
            weights[name] = value.cpu().clone()
    return weights if is_main else None


def weights_of(result: StageResult) -> dict[str, torch.Tensor]:
    weights = full_state_dict(result.model)
    assert weights is not None
    return weights


def steps_done(directory: Path) -> int:
    """Steps of the run there whose figures are written."""
    path = directory / "run" / "metrics.jsonl"
    return path.read_text().count('"learning_rate"') if path.exists() else 0  # evaluations have none


def kill_before_step(directory: Path, step: int, spec: dict[str, Any]) -> None:
    """Train as `start` does, and kill the process when the steps before `step` are done."""
    process = start({"directory": str(directory), "holds_at": step, **spec})
    end = time.monotonic() + 240
    while steps_done(directory) < step and process.is_alive() and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert steps_done(directory) == step


def start(spec: dict[str, Any], **environment: str) -> ForkServerProcess:
    """Train a job in a process of its own: `directory`, `objective`, arguments of `small_job`, and those of `train_and_save`.

    The processes are forked from one that has imported everything, so that starting one takes no time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # found from the root of the repository; elsewhere each process imports anew
    process = context.Process(target=_in_process, args=(spec, environment))
    process.start()
    return process


def _in_process(spec: dict[str, Any], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    train_and_save(**spec)


def train_and_save(
    directory: str,
    objective: str,
    *,
    pause: float = 0.0,
    holds_at: int | None = None,
    refuse_writes_from: int | None = None,
    asked: str | None = None,
    **changes: Any,
) -> None:
    """Train a small job; rank 0 saves weights and outcome to `<run>.pt`, or a `UserError` to `<run>.error` and exits with 2.

    Every step takes `pause` seconds longer, and step `holds_at` does not come, so that the process can be killed there however
    late that is. From step `refuse_writes_from` on the system refuses files of more than 20 kB. The
    number of the batch that is asked for is written to the file `asked`.
    """
    torch.set_num_threads(1)
    out = Path(directory) / changes.get("run", "run")

    def before_step(step: int) -> None:
        time.sleep(pause)
        if step == holds_at == steps_done(Path(directory)):  # a reference pass asks for it before
            time.sleep(600)
        if asked is not None:
            (Path(directory) / asked).write_text(str(step))
        if refuse_writes_from is not None and step >= refuse_writes_from:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    try:
        with session() as ranks, calling_before_each_step(before_step):
            result = train_stage(small_job(Path(directory), objective, **changes), ranks)
            weights = full_state_dict(result.model)
            if ranks.is_main:
                torch.save({"weights": weights, "interrupted": result.interrupted, "steps": result.steps}, f"{out}.pt")
    except UserError as error:
        Path(f"{out}.error").write_text(str(error))
        raise SystemExit(2) from error


@contextlib.contextmanager
def calling_before_each_step(function: Callable[[int], None]) -> Iterator[None]:
    """Call `function` with the step's number whenever a step's batch is asked for."""
    original = Stream.batch

    def batch(self: Stream, step: int, rank: int = 0, world: int = 1) -> Batch:
        function(step)
        return original(self, step, rank, world)

    Stream.batch = batch  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stream.batch = original  # type: ignore[method-assign]


if __name__ == "__main__":
    train_and_save(**json.loads(Path(sys.argv[1]).read_text()))
