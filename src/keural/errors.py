"""The user's kind of error, and how text of strangers is put into a line that a person reads.

Anything the user can mend (a wrong recipe, a missing file, bad rows, a full disk) is raised as `UserError`, whose message says on
one line what is wrong, where, and what to do. The command line prints that line and exits with code 2. What only a programming
mistake can cause is an `assert` or an ordinary exception.
"""

import difflib
import errno
import reprlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")
MAX_MESSAGE = 1000
"""Characters of a message; of a longer one the middle is left out."""
MAX_NAME = 100
"""Characters of a name that others are compared with; nobody misspells a longer one."""
_JOINERS = "\u00ad\u200c\u200d"
"""Invisible characters that belong to ordinary text: soft hyphen, zero-width non-joiner and joiner."""
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class UserError(Exception):
    """A mistake the user can mend; `str(error)` is one line: what, where, what to do.

    `told` says that another process prints the message already.
    """

    def __init__(self, message: str, told: bool = False) -> None:
        line = visible(" ".join(message.split()), keep="")
        if len(line) > MAX_MESSAGE:
            line = f"{line[: MAX_MESSAGE * 3 // 4]} … {line[-MAX_MESSAGE // 4 :]}"
        super().__init__(line)
        self.told = told

    @property
    def lines(self) -> tuple[str, ...]:
        """What is said, a line for each mistake."""
        return (str(self),)


class UserErrors(UserError):
    """Several mistakes that were found at once; each has a line of its own."""

    def __init__(self, errors: Iterable[UserError]) -> None:
        self._lines = tuple(dict.fromkeys(line for error in errors for line in error.lines))
        super().__init__("; ".join(self._lines))

    @property
    def lines(self) -> tuple[str, ...]:
        """What is said, a line for each mistake."""
        return self._lines


def for_all(values: Iterable[T], action: Callable[[T], U]) -> list[U]:
    """What the action makes of every value. Raises the `UserError`s of all for which it fails, once all are tried."""
    made, errors = [], []
    for value in values:
        try:
            made.append(action(value))
        except UserError as error:
            errors.append(error)
    raise_all(errors)
    return made


def raise_all(errors: Sequence[UserError]) -> None:
    """Raise what went wrong, if anything did; one mistake as it is."""
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)


def visible(text: str, keep: str = "\n\t") -> str:
    r"""`text` with every character that a terminal obeys, or that hides or turns its neighbours, written out as `\x1b`, `\u202e`.

    These are the control characters except those in `keep`, bidirectional and other invisible signs, line and paragraph
    separators, and lone surrogates (bytes of a file name that are no UTF-8).
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_written_out(character) if is_hidden(character) and character not in keep else character for character in text)


def is_hidden(character: str) -> bool:
    """Whether `visible` writes a character out; newline and tab are hidden ones."""
    return unicodedata.category(character) in _HIDDEN and character not in _JOINERS


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class _Short(reprlib.Repr):
    """Python's notation of a value, shortened before it is written: a value may be far larger than what it was read from."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 4
        self.maxstring = self.maxother = 80

    def repr_int(self, value: int, level: int) -> str:
        """A number; Python refuses to write one of thousands of digits."""
        return repr(value) if value.bit_length() <= 128 else f"a number of {value.bit_length()} bits"

    def repr_str(self, value: str, level: int) -> str:
        """A text, from its start."""
        return repr(value if len(value) <= self.maxstring else f"{value[: self.maxstring]}…")


def quoted(value: Any) -> str:
    """A value as an error message quotes it: Python's notation, short however large or deep the value is."""
    return _Short().repr(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the known name most like `name`, or nothing when none is like it."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4) if len(name) <= MAX_NAME else []
    return f" (did you mean {match[0]!r}?)" if match else ""


_REFUSED = {
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "not enough memory",
    errno.EAGAIN: "no further process or thread may be started",
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would become larger than allowed",
    errno.EIO: "the device cannot be read or written (input/output error)",
}
"""What a machine refuses, whatever is done with it."""
_ADVICE = {
    errno.EMFILE: "raise the limit with `ulimit -n 1024`, or lower the number of workers",
    errno.ENFILE: "close some programs",
    errno.ENOMEM: "close other programs, raise `ulimit -v`, or choose smaller sizes",
    errno.EAGAIN: "raise `ulimit -u`, end other programs, or lower the number of workers",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EFBIG: "raise `ulimit -f`",
    errno.EIO: "look whether the device is in order",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.EROFS: "have the file system mounted for writing",
    errno.EISDIR: "it is a directory: move it away",
    errno.EEXIST: "a file is where a directory of its path should be, or has its name: move it away",
    errno.ENOTDIR: "a part of its path is a file, not a directory: move it away",
    errno.ENOTEMPTY: "it is a directory with files: move it away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "links in its path lead to each other: remove them",
}
"""What to do about a refusal, of the machine or of a place where something cannot be written."""
_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "failed to map segment",
    "bad_alloc",
    "std::bad_array_new_length",
    "unable to mmap",
)
_THREADS = ("can't start new thread", "resource temporarily unavailable", "thread creation failed")


def why_unwritten(error: BaseException) -> tuple[str, str]:
    """Why something could not be written, and what to do about that very reason: only a full disk asks for space."""
    if isinstance(error, UserError) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    number, reason = getattr(error, "errno", None), " ".join(str(error).split())[:300]
    if isinstance(error, OSError):
        reason = error.strerror or reason
    elif isinstance(error, MemoryError):
        number, reason = errno.ENOMEM, reason or "not enough memory"
    elif not isinstance(error, UserError):
        number = errno.EAGAIN if any(words in reason.lower() for words in _THREADS) else None
        reason = reason if number else " ".join(repr(error).split())[:300]
    return reason, _ADVICE.get(number or 0, "mend that")


def _refused(number: int) -> str:
    """A refusal of the machine, and what to do about it."""
    return f"{_REFUSED[number]}; {_ADVICE[number]}"


def refusal_of(error: BaseException) -> UserError | None:
    """What to say of a failure that is the machine's or a file's, wherever it came up; None for one of the program."""
    if isinstance(error, MemoryError):
        return UserError(_refused(errno.ENOMEM))
    if isinstance(error, OSError) and error.strerror is not None:
        named = f"{quoted_path(error.filename)}: " if error.filename is not None else ""
        if error.errno in _REFUSED:
            return UserError(f"{named}{_refused(error.errno)}")
        return UserError(f"{named}{error.strerror}") if named else None
    if isinstance(error, RuntimeError | ImportError | OSError):
        text = str(error).lower()
        if "too many open files" in text:
            return UserError(_refused(errno.EMFILE))
        if any(words in text for words in _MEMORY):
            return UserError(_refused(errno.ENOMEM))
        if any(words in text for words in _THREADS):
            return UserError(_refused(errno.EAGAIN))
    return None


def quoted_path(path: Any) -> str:
    """A path as the operating system's errors name it, shortened."""
    text = path.decode("utf-8", "surrogateescape") if isinstance(path, bytes) else str(path)
    return text if len(text) <= 300 else f"{text[:297]}..."


def listed(names: Sequence[str], shown: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
