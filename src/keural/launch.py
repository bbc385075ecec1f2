"""The `keural` command on many processes: `python -m keural.launch --nproc-per-node 8 train STAGE.yaml`.

In: torchrun's options, then a command. Out: the command's own lines and exit code. It is torchrun (`torchrun OPTIONS -m keural ...`
starts the same processes), without torchrun's traceback and table after every failure: one line says what ended the run, and the
exit code is that of the command.
"""

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from keural.cli.endings import USER_ERROR, one_line_endings
from keural.terminal import note


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the processes and wait for them; ends with `SystemExit`."""
    with one_line_endings():
        raise SystemExit(launch(sys.argv[1:] if arguments is None else list(arguments)))


def launch(arguments: list[str]) -> int:
    """Run a command on as many processes as torchrun's options say; returns the command's exit code."""
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # of torchrun's own loggers, which repeat what is said here
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = run.get_args_parser().parse_args(arguments)
    options.training_script_args = [options.training_script, *options.training_script_args]
    options.module, options.training_script = True, "keural"
    try:
        run.run(options)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        return _explain(failed.failures)
    return 0


def _explain(failures: Mapping[int, Any]) -> int:
    """Say what rank 0 has not said itself; returns the exit code."""
    said = {_message(failure) for rank, failure in failures.items() if rank == 0}
    for rank, failure in sorted(failures.items()):
        if (message := _message(failure)) is not None:
            if message not in said:
                note(f"rank {rank}: {message}")
            said.add(message)
        elif failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:  # SIGTERM is how torchrun ends the others
            cause = " (often: no memory was left)" if -failure.exitcode == signal.SIGKILL else ""
            note(f"keural: error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}{cause}")
    codes = {failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode for failure in failures.values()}
    ended = codes - {128 + signal.SIGTERM} or codes
    return USER_ERROR if USER_ERROR in ended else max(ended)


def _message(failure: Any) -> str | None:
    return str(failure.message.get("message")).rstrip() if isinstance(failure.message, dict) else None


if __name__ == "__main__":
    main()
