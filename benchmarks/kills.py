"""Whole runs that are killed again and again: what is left in the end, beside a run that never was.

    python benchmarks/kills.py [--kills 60] [--rank-kills 20] [--seed 1]

A tiny recipe with a tokenizer, pretraining, SFT, DPO and KTO (from the same start as DPO) is run, killed with SIGKILL after a
random time, run again, and so on until it ends; then a new run begins, until so many kills were spent. Then the same on two ranks
by `keural.launch`: at random all processes are killed, or one rank, whose end must end the other. Each finished run must have the
weights and losses of the one that was not killed, bit for bit, and the same files and no others. Prints what the run was doing at
each kill.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.fuzz_directories import write_data, write_recipe

os.environ.setdefault("OMP_NUM_THREADS", "1")
UNTIMED = ("loss", "gradient_norm", "learning_rate", "heldout", "tokens")
"""Of a line of metrics, what does not depend on the clock."""


def contents(run: Path) -> dict[str, str]:
    """Every file of a run, of weights and losses with what is in them.

    Not among them are `model-checked.json`, a note that a later command compared a model with its checksums, and lines of metrics
    that are damaged.
    """
    from keural.train.stage.metrics import read_metrics

    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.name.endswith(".safetensors") and "checkpoints" not in name:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "metrics.jsonl":
            found[name] = json.dumps([{key: line[key] for key in UNTIMED if key in line} for line in read_metrics(path)[0]])
        elif path.is_file() and path.name != "model-checked.json":
            found[name] = ""
    return found


def phase(run: Path) -> str:
    """What a run was doing when it was killed: the last directory in it that has no finished marker."""
    if not run.is_dir():
        return "start"
    for name in ("tokenizer", "base", "chat", "align", "judge", "final"):
        directory = run / name
        if not directory.is_dir():
            return f"before {name}"
        if name == "tokenizer" or (directory / "model" / "model.safetensors").exists() or name == "final":
            continue
        if not (directory / "metrics.jsonl").exists():
            return f"{name}: data or reference"
        return f"{name}: training"
    return "end"


class Forked:
    """A run in a forked process."""

    def __init__(self, recipe: Path, out: Path, *more: str) -> None:
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                log = os.open(str(out) + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 2)
                from keural.cli.app import main as command

                sys.argv = ["keural", "run", str(recipe), "--out", str(out), *more]
                command()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it still runs after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None

    def kill(self, _: random.Random) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Launched:
    """A run on two ranks."""

    def __init__(self, recipe: Path, out: Path) -> None:
        log = open(str(out) + ".log", "a")  # noqa: SIM115 - the process keeps it
        command = [sys.executable, "-m", "keural.launch", "--nproc-per-node", "2", "run", str(recipe), "--out", str(out)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it still runs after so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self, draw: random.Random) -> None:
        """Kill all processes, or one rank; the others must then end by themselves."""
        ranks = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        if ranks and draw.random() < 0.5:
            os.kill(int(draw.choice(ranks)), signal.SIGKILL)
            self.process.wait(90)
        else:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(90)


def spend(kills: int, start: type[Forked] | type[Launched], recipe: Path, work: Path, longest: float, draw: random.Random) -> None:
    """Spend the kills on runs, and compare each finished one with an undisturbed one."""
    begun = time.monotonic()
    assert start(recipe, work / "undisturbed").wait(900) == 0, (work / "undisturbed.log").read_text()[-3000:]
    seconds = time.monotonic() - begun
    expected = contents(work / "undisturbed")
    phases: collections.Counter[str] = collections.Counter()
    runs = spent = 0
    while spent < kills:
        out = work / f"killed-{runs}"
        while True:
            process = start(recipe, out)
            code = process.wait(draw.uniform(0.02, longest * seconds) if spent < kills else 900)
            if code is not None:
                break
            process.kill(draw)
            spent += 1
            phases[phase(out)] += 1
        assert code == 0, Path(f"{out}.log").read_text()[-3000:]
        found = contents(out)
        differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        assert not differing, f"after {spent} kills {out} differs in {differing}"
        runs += 1
    weights = sum(bool(re.search(r"safetensors$", name)) for name in expected)
    print(f"{start.__name__.lower()}: {spent} kills, {runs} runs of {seconds:.1f} s: {weights} weights, losses and files equal")
    print("killed in: " + ", ".join(f"{name} {count}" for name, count in phases.most_common()), flush=True)


def flip_in_a_run(work: Path, draw: random.Random, times: int) -> dict[str, collections.Counter[str]]:
    """Kill a recipe in its second stage, and flip bits of each file; what became of them by kind of file."""
    write_data(work / "data")
    write_recipe(work / "recipe", work / "data")
    until = ("--until", "chat")
    run = work / "run"
    process = Forked(work / "recipe", run, *until)
    while not list((run / "chat" / "checkpoints").glob("step-*")):
        assert process.wait(0.02) is None, Path(f"{run}.log").read_text()
    process.kill(draw)
    shutil.copytree(run, work / "whole", symlinks=True)
    assert Forked(work / "recipe", work / "whole", *until).wait(600) == 0
    expected = contents(work / "whole")
    outcomes: dict[str, collections.Counter[str]] = {}
    files = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size]
    for name in files:
        for _ in range(times):
            copy = work / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(run, copy, symlinks=True)
            data, place = bytearray((copy / name).read_bytes()), draw.randrange((copy / name).stat().st_size)
            data[place] ^= 1 << draw.randrange(8)
            (copy / name).write_bytes(data)
            before = steps_of(copy)
            Path(f"{copy}.log").unlink(missing_ok=True)
            code = Forked(work / "recipe", copy, *until).wait(600)
            said = [line for line in Path(f"{copy}.log").read_text().splitlines() if line.startswith("keural: error: ")]
            if code == 2:
                assert (len(said), steps_of(copy)) == (1, before), (name, place, said)
                outcome = "refused in one line before a step"
            else:
                assert code == 0, (name, place, code, Path(f"{copy}.log").read_text()[-2000:])
                found = contents(copy)
                weights = [key for key in expected if key.endswith((".safetensors", "metrics.jsonl")) and key != str(name)]
                assert all(found.get(key) == expected[key] for key in weights), (name, place)
                outcome = "not used, or made again: same weights and losses"
            outcomes.setdefault(kind_of(name), collections.Counter())[outcome] += 1
    return outcomes


def steps_of(run: Path) -> dict[str, int]:
    """Lines of the metrics of each stage."""
    return {str(path.parent.name): path.read_bytes().count(b"\n") for path in run.glob("*/metrics.jsonl")}


def kind_of(name: Path) -> str:
    """A file's kind: its path without what is numbered or drawn."""
    parts = ["…" if re.fullmatch(r"[0-9a-f]{16}|step-\d+|.{31,}", part) else part for part in name.parts]
    return "/".join("shard-*.safetensors" if part.startswith("shard-") else part for part in parts)


def main() -> None:
    """Make the recipe, and spend the kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--rank-kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_data(work / "data")
        write_recipe(work / "recipe", work / "data", labels=True)
        import keural.pipeline.run  # noqa: F401 - what forked processes need

        (work / "one").mkdir()
        spend(given.kills, Forked, work / "recipe", work / "one", 0.35, draw)
        (work / "two").mkdir()
        spend(given.rank_kills, Launched, work / "recipe", work / "two", 0.7, draw)


if __name__ == "__main__":
    main()
