"""What a person sees: the only place that writes to standard output and standard error.

In: lines, values, tables, progress, pieces of answers, whatever they quote. Out: text in which nothing from a file, a row, a model
or a command line is obeyed by a terminal (`keural.errors.visible`) or taken as rich's markup, in characters that the terminal has.

`show` and its kin give what a command was asked for; where nobody can read it any more, they raise. `say` and `note` tell how the
work goes; losing their reader must not lose the work, so they fall silent.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

import yaml

from keural.errors import UserError, is_hidden, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

Piece = tuple[str, str]
"""A text and rich's style for it, e.g. `dim`."""
SECONDS_BETWEEN_LINES = 60.0
"""How often a log is told of work that goes on."""
UNDERLINE = "underline"
"""The one style that says something that the text does not."""
MARKS, PLAIN_MARKS = ("⟦", "⟧"), ("[[", "]]")
"""What stands around underlined text where nothing can be underlined, and where these characters cannot be written."""


def open_streams() -> None:
    """Make the standard streams usable: a closed one becomes one to nowhere, and a character that a terminal lacks becomes `?`.

    A closed one must not stay closed: the next file that is opened would get its number, and what libraries print would go there.
    """
    for number in (0, 1, 2):
        if not _is_open(number):
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")
    if sys.stdin is not None and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


class _Stream:
    """A standard stream as a file. A strict one raises where it cannot be written, the other falls silent."""

    def __init__(self, stream: TextIO, name: str, strict: bool) -> None:
        self._stream, self._name, self._strict = stream, name, strict
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write text as it is. Raises BrokenPipeError where its reader has gone, `UserError` where a disk refuses it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Hand over what is buffered; raises as `write` does."""
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return _is_terminal(self._stream)

    def fileno(self) -> int:
        """Its number."""
        return self._stream.fileno()

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            _let_go(self._stream)
            if not self._strict:
                return
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(f"{self._name} cannot be written ({error.strerror})") from error


def _let_go(stream: TextIO) -> None:
    """Lead a stream that cannot be written to nowhere: what is buffered is written at the end, and must not fail there again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def is_terminal(name: Literal["stdin", "stdout", "stderr"]) -> bool:
    """Whether a standard stream is a terminal; a closed one is none."""
    return _is_terminal(getattr(sys, name))


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def _out(strict: bool = True) -> _Stream:
    return _Stream(sys.stdout, "standard output", strict)


def _error() -> _Stream:
    return _Stream(sys.stderr, "standard error", strict=False)


def _console(stream: _Stream) -> "Console":
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False)  # type: ignore[arg-type]


def _print(stream: _Stream, pieces: Iterable[Piece]) -> None:
    """A line of styled pieces. Rich is asked only for a terminal: it would take tabs and long lines for layout."""
    made = [(visible(text), style) for text, style in pieces]
    if not _can_underline(stream):
        before, after = marks(stream)
        made = [(f"{before}{text}{after}" if style == UNDERLINE else text, style) for text, style in made]
    if not stream.isatty():
        stream.write("".join(text for text, _ in made) + "\n")
    else:
        from rich.text import Text

        _console(stream).print(Text.assemble(*made), soft_wrap=True)
    stream.flush()


def _can_underline(stream: _Stream) -> bool:
    return stream.isatty() and _console(stream).color_system is not None


def marks(stream: _Stream | None = None) -> tuple[str, str]:
    """What stands around underlined text in a stream, standard output if none is given, that cannot underline."""
    try:
        "".join(MARKS).encode((stream or _out()).encoding)
    except (UnicodeEncodeError, LookupError):
        return PLAIN_MARKS
    return MARKS


def underline_words() -> str:
    """What underlined text is, for a reader of standard output."""
    if _can_underline(_out()):
        return "underlined"
    return "between {} and {}".format(*marks())


def show(text: str, style: str = "") -> None:
    """A line of what was asked for."""
    _print(_out(), [(text, style)])


def show_pieces(pieces: Sequence[Piece]) -> None:
    """A line of what was asked for, with a style for each part."""
    _print(_out(), pieces)


def show_text(text: str) -> None:
    """Several lines of what was asked for, with their ends."""
    stream = _out()
    stream.write(visible(text))
    stream.flush()


def show_json(value: Any) -> None:
    """A value as JSON."""
    show_text(json_text(value))


def json_text(value: Any) -> str:
    """A value as indented JSON, hidden characters as JSON's escapes, so that the text still holds the value."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    return "".join(json.dumps(part)[1:-1] if part != "\n" and is_hidden(part) else part for part in text) + "\n"


def yaml_text(value: Any, flow: bool = False) -> str:
    """A value as YAML, with `flow` on one line; hidden characters as YAML's escapes, so that the text still holds the value."""
    layout: dict[str, Any] = {"default_flow_style": True, "width": math.inf} if flow else {}
    text: str = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, sort_keys=False, **layout)
    return "".join(_yaml_escape(part) if part != "\n" and is_hidden(part) else part for part in text)


class _Dumper(yaml.SafeDumper):
    """Texts with hidden characters stand in double quotes, where an escape is one."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(is_hidden(character) and character != "\n" for character in text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _yaml_escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def show_table(title: str, columns: Mapping[str, Literal["left", "right"]], rows: Iterable[Sequence[str]]) -> None:
    """A table under a title; long cells are folded."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(title)))
    for name, side in columns.items():
        table.add_column(Text(visible(name)), justify=side, overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    stream = _out()
    _console(stream).print(table)
    stream.flush()


def show_answer(text: str) -> None:
    """A piece of a model's answer, at once: a terminal gets it escaped, a file or a pipe gets it as it is."""
    stream = _out()
    stream.write(visible(text) if stream.isatty() else text.encode("utf-8", "replace").decode())
    stream.flush()


def say(text: str, style: str = "") -> None:
    """A line about the work on standard output."""
    _print(_out(strict=False), [(text, style)])


def note(text: str, style: str = "") -> None:
    """A line about the work, or an error, on standard error."""
    _print(_error(), [(text, style)])


def status(text: str) -> contextlib.AbstractContextManager[object]:
    """A sign of life on the terminal while a block is at work."""
    from rich.text import Text

    return _console(_out(strict=False)).status(Text(visible(text)))


def progress(*columns: "ProgressColumn", transient: bool = False) -> "Progress":
    """A bar on standard error; nothing where that is no terminal. Texts in columns must be `visible` and without markup."""
    from rich.progress import Progress

    console = _console(_error())
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)


def note_above(bar: "Progress", text: str) -> None:
    """A line about the work above a bar that is shown."""
    bar.console.print(visible(text), highlight=False, markup=False)


@contextlib.contextmanager
def work_progress() -> Iterator[Callable[[str], None]]:
    """Shows on a terminal what work has come to; gives the function that is told of it, as often as one likes.

    Where standard error is no terminal, what it is told is a line once a minute: a long job leaves a trace in its log.
    """
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with progress(*columns, transient=True) as shown:
        task, said = shown.add_task("", total=None), time.monotonic()

        def tell(text: str) -> None:
            nonlocal said
            if not shown.disable:
                shown.update(task, description=visible(text))
            elif (now := time.monotonic()) - said >= SECONDS_BETWEEN_LINES:
                said = now
                note(text)

        yield tell


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int], None]]:
    """Shows on a terminal how many bytes were worked on; gives the function that is told of more."""
    from rich.progress import DownloadColumn, SpinnerColumn, TextColumn, TransferSpeedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), DownloadColumn(), TransferSpeedColumn())
    with progress(*columns, transient=True) as shown:
        task = shown.add_task(visible(what), total=None)
        yield lambda count: shown.advance(task, count)
