"""Slurm jobs that run the pipeline they were submitted with, or none.

datatrove hands a pipeline to its jobs as a pickle, `executor.pik` in the directory of the step's logs, and reading a pickle runs
what is in it. The file is written anew at every submission, but a job may wait for hours until it reads it. Slurm keeps the job's
script from the moment of submission, so the script holds the checksum, and compares it before anything is read.
"""

from pathlib import Path

from datatrove.executor import SlurmPipelineExecutor

from keural.files import sha256_file

PICKLE = "executor.pik"


class CheckedSlurmExecutor(SlurmPipelineExecutor):
    """datatrove's executor, whose jobs end with an error when their pickle is not the one that was submitted."""

    def get_launch_file_contents(self, sbatch_args: dict[str, object], run_script: str) -> str:
        """The script of a job; see `SlurmPipelineExecutor`."""
        pickled = Path(self.logging_dir.resolve_paths(PICKLE))
        if run_script.endswith(f"launch_pickled_pipeline {pickled}"):
            run_script = f'sha256sum --check --status <<< "{sha256_file(pickled)}  {pickled}" && {run_script}'
        return str(super().get_launch_file_contents(sbatch_args, run_script))
