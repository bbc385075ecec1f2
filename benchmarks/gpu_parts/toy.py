"""Part `toy`: `keural run recipes/toy` in each precision, by the command line."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu_parts.bench import Bench

ADAMW = ["train.optimizer=adamw", "train.muon={}"]
TOY = {
    "fp32": [],
    "bfloat16": ["train.compute_dtype=bfloat16"],
    "split": [*ADAMW, "train.precision=split", "train.recompute=selective"],
    "split_host": [*ADAMW, "train.precision=split-host", "train.recompute=full"],
}
"""Settings of the toy recipe by the precision that is tried; its own optimizer goes with float32 alone."""
ENDING = 2.0
"""Seconds before the part's limit at which a command is ended."""


def toy(bench: Bench) -> None:
    """The toy pipeline by the command line, on one set of data; without an accelerator its first stage only."""
    root = Path(__file__).resolve().parents[2]
    modes = {name: TOY[name] for name in ("fp32", "split")} if bench.small else TOY
    with tempfile.TemporaryDirectory() as directory:
        for name, settings in modes.items():
            with bench.guarded(name, 10):
                command = [sys.executable, "-m", "keural", "run", str(root / "recipes/toy"), "--out", directory + "/toy", *settings]
                command += ["pretrain-1.train.steps=4", "pretrain-1.train.warmup_steps=1"] if bench.small else []
                command += ["--until", "sft-1" if name == "fp32" and not bench.small else "pretrain-1"]
                left = max(1.0, bench.deadline - time.monotonic() - ENDING)  # a command that outlives its part would hold the card
                done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory, timeout=left)
                lines = [line for line in (done.stdout + done.stderr).splitlines() if "tok/s" in line or "held-out" in line]
                errors = done.stderr.strip().splitlines()[-3:] if done.returncode else []
                bench.record(name, exit_code=done.returncode, lines=lines, errors=errors)
