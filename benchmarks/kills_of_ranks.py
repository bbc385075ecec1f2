"""One stage on 1, 2 and 4 ranks whose ranks are killed at random moments, during a save too; flipped bits; SIGTERM.

    python -m benchmarks.kills_of_ranks [--kills 30] [--seed 1] [--flips 1] [--experts 1]

A tiny stage whose checkpoints are written while training goes on (on CPU, gloo); writing is slowed down, so that it lasts several
steps. Again and again a random rank is killed with SIGKILL: every second time at a random moment of a save, else at a random moment
of the run. The others are then killed at once, or get SIGTERM and a moment, as launchers do it. Then the run is started again, on
as many ranks or on another number, until a part's kills are spent; every run goes to its end.

- On the same number of ranks the last checkpoint (weights and moments) and all losses must be those of a run that nothing
  disturbed, bit for bit; on changing numbers all losses within 1e-5 of one rank's.
- With `--experts 2` the experts are divided among pairs of ranks wherever there are two (`train.expert_parallel`).
- A whole recipe is killed in a stage. A bit is flipped in each of its files: `keural run` must refuse it before a step is done, or
  come to the same weights without what was damaged.
- SIGTERM during a save: the state of the last step must be a whole checkpoint, and the processes have ended, within 30 seconds.

Prints a table row for each as it comes.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
STEPS, EVERY, STEP_SECONDS = 16, 4, 0.05
WORLDS = (1, 2, 4)
LOSS_ERROR, SAVE_SECONDS = 1e-5, 30.0


@dataclass
class Kills:
    """What a run went through."""

    spent: int = 0
    in_a_save: int = 0
    runs: int = 0
    """Finished and compared."""
    resumed: int = 0
    """Starts that had a whole checkpoint to go on from."""
    worlds: list[int] = field(default_factory=list)
    """Ranks of each start."""


def train(directory: str, run: str, environment: dict[str, str], slow: float, experts: int) -> None:
    """A rank: train the stage of `directory` into its `run`; every block of a checkpoint takes `slow` seconds.

    `experts` is `train.expert_parallel` where that divides the number of ranks.
    """
    os.environ.update(environment)
    log = os.open(f"{directory}/{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import numpy as np
    import torch

    from keural.data.tokens.store import StoreWriter
    from keural.model import KeuralConfig
    from keural.recipe import StageSpec
    from keural.train.checkpoints import writing
    from keural.train.processes.ranks import session
    from keural.train.stage.job import StageJob
    from keural.train.stage.run import StageRun
    from keural.train.stage.training import train_stage

    torch.set_num_threads(1)
    write, step = writing.write_file, StageRun._step

    def write_slowly(path: Path, pieces: Any, go_on: Any) -> str:
        def pausing() -> None:
            time.sleep(slow)
            go_on()

        return write(path, pieces, pausing)

    def step_slowly(self: StageRun) -> Any:
        time.sleep(STEP_SECONDS if slow else 0.0)
        return step(self)

    writing.write_file, StageRun._step = write_slowly, step_slowly  # type: ignore[method-assign]
    store = Path(directory) / "store"
    if not store.exists():
        draw, lengths = np.random.default_rng(0), [int(length) for length in np.random.default_rng(1).integers(4, 30, 200)]
        with StoreWriter(store, "0" * 64, 96, "documents") as writer:
            for length in lengths:
                writer.add(draw.integers(4, 96, length).astype(np.uint32), None)
    config = KeuralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, num_local_experts=4, sliding_window=9, max_position_embeddings=64, eos_token_id=95,
    )  # fmt: skip
    spec = {
        "name": "stage",
        "objective": "next_token",
        "data": {"sequence_length": 32, "sources": [{"name": "random", "adapter": "text"}]},
        "train": {"steps": STEPS, "batch_tokens": 256, "lr": 1e-3, "warmup_steps": 2, "save_every": EVERY, "keep_checkpoints": 2,
                  "expert_parallel": 1 if int(environment["WORLD_SIZE"]) % experts else experts},
    }  # fmt: skip
    place = Path(directory) / run
    place.mkdir(exist_ok=True)
    job = StageJob(StageSpec.model_validate(spec), 11, config, None, store, None, "0" * 64, place, "f" * 64)
    with session() as ranks:
        interrupted = train_stage(job, ranks).interrupted
    os._exit(130 if interrupted else 0)  # without a wait for what the process group still has to tear down


def start(directory: Path, run: str, world: int, slow: float, experts: int = 1) -> list[ForkServerProcess]:
    """Start the stage on so many ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["keural.train.stage.training", "torch.distributed.checkpoint.hf_storage"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(world):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "RANK": str(rank)}
        environment |= {"LOCAL_RANK": str(rank)} if world > 1 else {}
        arguments = (str(directory), run, environment, slow, experts)
        ranks.append(context.Process(target=train, args=arguments))
        ranks[-1].start()
    return ranks


def finish(ranks: Sequence[ForkServerProcess], codes: tuple[int, ...] = (0,)) -> None:
    """Wait until all ranks have ended well."""
    for process in ranks:
        process.join(300)
    found = [process.exitcode for process in ranks]
    assert all(code in codes for code in found), found


def is_saving(run: Path, since: float) -> bool:
    """Whether a save that was begun after `since` is under way: its directory has no final name yet."""
    for path in (run / "checkpoints").glob(".step-*.tmp"):
        try:
            if path.stat().st_mtime > since and not (path / "manifest.json").exists():
                return True
        except FileNotFoundError:
            continue
    return False


def kill_once(ranks: Sequence[ForkServerProcess], run: Path, draw: random.Random, aimed: bool, longest: float) -> bool | None:
    """Kill a random rank after a random time, `aimed` at a save; whether it was in one. None: the run was over before."""
    since, end, passing = time.time(), time.monotonic() + draw.uniform(0.0, longest), draw.random() < 0.5
    while all(process.exitcode is None for process in ranks) and (aimed or time.monotonic() < end):
        if aimed and is_saving(run, since):
            if not passing:
                time.sleep(draw.uniform(0.0, 0.3))
                break
            while is_saving(run, since) and all(process.exitcode is None for process in ranks):
                time.sleep(0.01)
            passing = False  # this save has become whole: the next one
        time.sleep(0.01)
    victim, inside = draw.choice(ranks), is_saving(run, since)
    if any(process.exitcode is not None for process in ranks):
        finish(ranks)
        return None
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    if draw.random() < 0.5:
        for process in ranks:
            process.terminate()
        until = time.monotonic() + 2.0
        while time.monotonic() < until and any(process.exitcode is None for process in ranks):
            time.sleep(0.02)
    for process in ranks:
        process.kill()
        process.join()
    return inside


def killed(
    directory: Path, part: str, worlds: Sequence[int], kills: int, draw: random.Random, slow: float, longest: float, experts: int
) -> tuple[Kills, list[Path]]:
    """Run the stage to its end again and again until `kills` kills are spent, every start on a number of ranks drawn from `worlds`,
    another than before; what that took, and the finished runs.
    """
    found, runs = Kills(), [directory / f"{part}-0"]
    while True:
        choices = [world for world in worlds if [world] != found.worlds[-1:]] or list(worlds)
        found.worlds.append(draw.choice(choices))
        found.resumed += last_step(runs[-1]) > 0
        ranks = start(directory, runs[-1].name, found.worlds[-1], slow, experts)
        if found.spent == kills:
            finish(ranks)
            return found, runs
        inside = kill_once(ranks, runs[-1], draw, found.spent % 2 == 0, longest)
        if inside is None:
            runs.append(directory / f"{part}-{len(runs)}")
        else:
            found.spent, found.in_a_save = found.spent + 1, found.in_a_save + inside


def last_step(run: Path) -> int:
    """Of the newest whole checkpoint, 0 without any."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def result(run: Path) -> tuple[dict[str, str], list[float]]:
    """SHA-256 of the files of the last checkpoint, and all losses."""
    assert last_step(run) == STEPS
    manifest = json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return manifest["files"], [line["loss"] for line in lines if "loss" in line]


def kill_on_ranks(
    directory: Path, kills: int, draw: random.Random, slow: float = 0.02, worlds: Sequence[int] = WORLDS, experts: int = 1
) -> Kills:
    """Spend the kills, half of them on the same number of ranks each time, half on changing numbers; prints a row for each part."""
    directory.mkdir(parents=True, exist_ok=True)
    plain, seconds = {}, 0.0
    for world in worlds:
        begun = time.monotonic()
        finish(start(directory, f"plain-{world}", world, slow, experts))
        plain[world], seconds = result(directory / f"plain-{world}"), max(seconds, time.monotonic() - begun)
    total, parts = Kills(), [[world] for world in worlds] + [list(worlds)] * len(worlds)
    for number, part in enumerate(parts):
        share = kills // len(parts) + (number < kills % len(parts))
        found, runs = killed(directory, f"part-{number}", part, share, draw, slow, seconds, experts)
        if len(part) == 1:
            assert all(result(run) == plain[part[0]] for run in runs), "not the bits of the run that was not killed"
            outcome = "equal, bit for bit"
        else:
            expected = plain[worlds[0]][1]
            pairs = [zip(result(run)[1], expected, strict=True) for run in runs]
            largest = max(abs(ours - theirs) for losses in pairs for ours, theirs in losses)
            assert largest <= LOSS_ERROR, f"losses differ by {largest}"
            outcome = f"losses within {largest:.1e}"
        starts = ", ".join(map(str, found.worlds))
        print(f"| {starts} | {found.spent} | {found.in_a_save} | {found.resumed} | {len(runs)} | {outcome} |", flush=True)
        total.spent, total.in_a_save = total.spent + found.spent, total.in_a_save + found.in_a_save
        total.runs, total.resumed = total.runs + len(runs), total.resumed + found.resumed
    return total


def stop_on_ranks(directory: Path, world: int, slow: float = 0.02, experts: int = 1) -> float:
    """Send SIGTERM to all ranks during a save; seconds until all have ended. The last step must be saved."""
    run = directory / f"stopped-{world}"
    since, ranks = time.time(), start(directory, run.name, world, slow, experts)
    while not is_saving(run, since):
        assert all(process.exitcode is None for process in ranks)
        time.sleep(0.01)
    begun = time.monotonic()
    for process in ranks:
        process.terminate()
    finish(ranks, (130,))
    seconds = time.monotonic() - begun
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert last_step(run) == done, (last_step(run), done)
    assert seconds < SAVE_SECONDS
    return seconds


def main() -> None:
    """Spend the kills, flip the bits, send the signals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--flips", type=int, default=1, help="bits flipped in each file, one at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--experts", type=int, choices=(1, 2, 4), default=1, help="train.expert_parallel where that divides the ranks"
    )
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names = (
            "ranks of each start",
            "kills",
            "in a save",
            "starts from a checkpoint",
            "finished runs",
            "beside the undisturbed run",
        )
        print(f"| {' | '.join(names)} |\n|---|---:|---:|---:|---:|---|")
        total = kill_on_ranks(work / "ranks", given.kills, draw, experts=given.experts)
        print(f"\n{total.spent} kills, {total.in_a_save} of them while a checkpoint was written\n", flush=True)
        assert total.in_a_save * 3 >= total.spent
        print("| SIGTERM during a save, ranks | seconds until all had saved and ended |\n|---|---:|")
        for world in WORLDS:
            print(f"| {world} | {stop_on_ranks(work / 'ranks', world, experts=given.experts):.1f} |", flush=True)
        print("\n| file with a flipped bit | outcome |\n|---|---|")
        import keural.pipeline.run  # noqa: F401 - what forked processes need
        from benchmarks.kills import flip_in_a_run

        for kind, counts in flip_in_a_run(work / "flips", draw, given.flips).items():
            print(f"| `{kind}` | {', '.join(f'{name}: {count}' for name, count in counts.items())} |", flush=True)


if __name__ == "__main__":
    main()
