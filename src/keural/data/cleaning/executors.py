"""Where cleaning runs: processes of this machine, a Slurm cluster, or Ray; datatrove's executors behind one function.

A step is a pipeline, a number of tasks and a directory for its logs and completion marks. What is complete is not run again,
whatever the executor. On Slurm steps are submitted as a chain of jobs, and `Submitted` says so.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from keural.errors import UserError
from keural.files import read_object, write_json
from keural.recipe import ExecutorSpec


@dataclass(frozen=True)
class Step:
    """One pass over the data: the blocks, made when it is started; how many tasks; where it keeps its marks."""

    name: str
    blocks: Callable[[], Sequence[Any]]
    tasks: int
    logs: Path


class Submitted(UserError):
    """The work was handed to a cluster and goes on there."""


def check_executor(spec: ExecutorSpec) -> None:
    """Raise `UserError` when the executor cannot run here, or its settings would be more than settings in a job's script."""
    for name, value in (("partition", spec.partition), ("time", spec.time), ("qos", spec.qos), *spec.sbatch.items()):
        if value is not None and (not name.isprintable() or not value.isprintable()):
            raise UserError(f"data.cleaning.executor: {name!r}: {value!r} is not one line of text; give one")
    if spec.kind == "slurm" and shutil.which("sbatch") is None:
        raise UserError("data.cleaning.executor: kind slurm needs sbatch on the PATH; run on a login node, or use kind: local")
    if spec.kind == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("data.cleaning.executor: kind ray needs Ray: pip install ray, or use kind: local")


def run_steps(steps: Sequence[Step], spec: ExecutorSpec) -> None:
    """Run steps one after the other, leaving out what is complete. Raises `Submitted` when Slurm has taken them."""
    logger.disable("datatrove")  # its reports go on with the run's own output otherwise
    try:
        if all(_is_complete(step) for step in steps):
            return
        RUNNERS[spec.kind](steps, spec)
    finally:
        logger.enable("datatrove")


def _is_complete(step: Step) -> bool:
    return all((step.logs / "completions" / f"{task:05d}").is_file() for task in range(step.tasks))


def _run_here(steps: Sequence[Step], spec: ExecutorSpec) -> None:
    from datatrove.executor import LocalPipelineExecutor

    for step in steps:
        workers = min(spec.workers or len(os.sched_getaffinity(0)), step.tasks)
        # Forked workers need no importable main module; nothing that computes in threads has been started in this one.
        executor = LocalPipelineExecutor(
            list(step.blocks()), tasks=step.tasks, workers=workers, logging_dir=str(step.logs), start_method="fork"
        )
        with _workers_not_interrupted():
            executor.run()


@contextlib.contextmanager
def _workers_not_interrupted() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal. Here it ends this one, which ends its workers; they would print traces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, before = os.getpid(), signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: object) -> None:
        if os.getpid() == owner:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run_with_ray(steps: Sequence[Step], spec: ExecutorSpec) -> None:
    from datatrove.executor.ray import RayPipelineExecutor

    for step in steps:
        RayPipelineExecutor(
            list(step.blocks()),
            tasks=step.tasks,
            workers=spec.workers or -1,
            logging_dir=str(step.logs),
            cpus_per_task=spec.cpus_per_task,
            mem_per_cpu_gb=spec.mem_per_cpu_gb,
        ).run()
        if not _is_complete(step):
            raise UserError(f"{step.logs}: not every task succeeded; see the logs there, and run the command again")


def _submit(steps: Sequence[Step], spec: ExecutorSpec) -> None:
    from keural.data.cleaning.slurm import CheckedSlurmExecutor

    assert spec.partition is not None  # the recipe's own check
    waiting = [step for step in steps if not _is_complete(step)]
    logs = steps[0].logs.parent.absolute()
    if shlex.quote(str(logs)) != str(logs):
        raise UserError(f"{logs}: has characters that a shell takes for commands or spaces; give the run another directory")
    submitted = logs / "submitted.json"
    if submitted.is_file() and (running := _running(_submitted_jobs(submitted))):
        raise Submitted(f"cleaning is at work on Slurm (jobs {', '.join(running)}); run this command again when it is done")
    chain: list[Any] = []
    for step in waiting:
        executor = CheckedSlurmExecutor(
            list(step.blocks()),
            tasks=step.tasks,
            time=spec.time,
            partition=spec.partition,
            cpus_per_task=spec.cpus_per_task,
            mem_per_cpu_gb=spec.mem_per_cpu_gb,
            workers=spec.workers or -1,
            job_name=f"keural-{step.name}",
            qos=spec.qos or "",
            venv_path=str(Path(sys.prefix) / "bin" / "activate"),
            sbatch_args=dict(spec.sbatch),
            depends=chain[-1] if chain else None,
            logging_dir=str(step.logs.absolute()),
        )
        chain.append(executor)
    try:
        chain[-1].run()
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"sbatch refuses the job (exit {error.returncode}); see {steps[0].logs.parent}/*/launch_script.slurm"
        ) from error
    jobs = [str(each.job_id) for each in chain]
    write_json(submitted, {"jobs": jobs})
    raise Submitted(f"cleaning was submitted to Slurm (jobs {', '.join(jobs)}); run this command again when it is done")


def _submitted_jobs(file: Path) -> list[str]:
    """The jobs that an earlier command submitted. Raises `UserError` when the file does not say."""
    jobs = read_object(file).get("jobs")
    if not isinstance(jobs, list) or not all(isinstance(job, str) and re.fullmatch(r"-?\d+", job) for job in jobs):
        raise UserError(f"{file}: damaged (jobs); delete it and run the same command again")
    return jobs


def _running(jobs: Sequence[str]) -> list[str]:
    """Those jobs that the queue still has."""
    if shutil.which("squeue") is None:
        return []
    found = subprocess.run(["squeue", "-h", "-o", "%A", "-j", ",".join(jobs)], capture_output=True, text=True, check=False)
    return sorted(set(found.stdout.split()) & set(jobs))


RUNNERS: dict[str, Callable[[Sequence[Step], ExecutorSpec], None]] = {
    "local": _run_here,
    "slurm": _submit,
    "ray": _run_with_ray,
}
