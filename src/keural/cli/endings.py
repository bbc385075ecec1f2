"""How a command ends: every failure that is the user's, a file's or the machine's is one line and exit code 2.

In: what a command raises. Out: the line on standard error and the exit code. Under torchrun rank 0 speaks for all; what each
rank has to say is left for torchrun's summary too, where what another rank alone knows is found.
"""

import contextlib
import json
import os
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import typer

from keural.errors import UserError, refusal_of
from keural.terminal import note, open_streams, show_text

USER_ERROR = 2
READER_LEFT = 1
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Of click, which typer brings along: an option that does not exist, a value that is none."""


@contextlib.contextmanager
def one_line_endings() -> Iterator[None]:
    """Run a command line inside; leave with `SystemExit` and one line where it fails."""
    open_streams()
    try:
        yield
    except UserError as error:
        raise SystemExit(_refuse(error)) from None
    except _UsageError as error:
        raise SystemExit(_wrong_usage(error)) from None
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        raise SystemExit(READER_LEFT) from None
    except Exception as error:
        refusal = _peer_failure(error) or refusal_of(error)
        if refusal is not None:
            raise SystemExit(_refuse(refusal)) from None
        if _rank() == 0:
            raise
        _tell_torchrun(traceback.format_exc())
        raise SystemExit(1) from None


def _rank() -> int:
    return int(os.environ.get("RANK", "0")) if "LOCAL_RANK" in os.environ else 0


def _refuse(error: UserError) -> int:
    if _rank() == 0:
        for line in error.lines:
            note(f"keural: error: {line}")
    if "LOCAL_RANK" in os.environ and not error.told:
        _tell_torchrun(f"keural: error: {error}")
    return USER_ERROR


def _wrong_usage(error: Exception) -> int:
    """An option or argument that typer refuses, with the command whose help says more; no arguments at all show that help."""
    context = getattr(error, "ctx", None)
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if type(error).__name__ == "NoArgsIsHelpError":
        show_text(message)
    else:
        note(f"keural: error: {UserError(message)} (see `{context.command_path if context else 'keural'} --help`)")
    return USER_ERROR


def _peer_failure(error: Exception) -> UserError | None:
    """What torch says of a lost connection when another rank has ended; that rank says why."""
    lost = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "socket timeout")
    if "LOCAL_RANK" not in os.environ or not isinstance(error, RuntimeError):
        return None
    if not any(words in str(error).lower() for words in lost):
        return None
    return UserError("another rank has ended, and this one cannot go on without it; its message says why", told=True)


def _tell_torchrun(message: str) -> None:
    """Leave a message where torchrun, or `keural.launch`, finds it."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(content), encoding="utf-8")
