"""Text of strangers in messages: escaped, short, on one line; and what a machine refuses is told apart from a bug."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.errors import MAX_MESSAGE, UserError, nearest, quoted, refusal_of, visible, why_unwritten


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Ja\r\x07\n\tb\x9b가", "\\x1b[2Ja\\r\\x07\n\tb\\x9b가".replace("\\r", "\\x0d")),
        ("\u202eevil\u2066\u200f", "\\u202eevil\\u2066\\u200f"),
        ("a\u2028b\u2029", "a\\u2028b\\u2029"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("name\udce9.txt", "name\\udce9.txt"),
        ("안녕 🇰🇷 👩\u200d💻 ㅋㅋ", "안녕 🇰🇷 👩\u200d💻 ㅋㅋ"),
    ],
)
def test_what_a_terminal_obeys_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text())
def test_nothing_that_is_shown_is_hidden(text: str) -> None:
    assert visible(visible(text)) == visible(text)
    visible(text).encode("utf-8")


def test_a_message_is_one_short_line() -> None:
    message = str(UserError("first\nsecond \x1b[31m" + "x" * 100_000))
    assert message.startswith("first second \\x1b[31m")
    assert "\n" not in message
    assert len(message) < MAX_MESSAGE + 10


def test_a_value_is_shortened_before_it_is_written() -> None:
    bomb: list[object] = ["x"]
    for _ in range(60):  # 9**60 values if it were written out
        bomb = [bomb] * 9
    for value in (bomb, "x" * 10**7, 10**50_000, {"k" * 10**6: bomb}, [list(range(1000))] * 1000):
        assert len(quoted(value)) < 1000
    assert quoted("짧은 글") == "'짧은 글'"
    assert quoted(-17) == "-17"


def test_nobody_misspells_a_name_of_megabytes() -> None:
    assert nearest("k" * 10**7, ["key"]) == ""
    assert nearest("kay", ["key"]) == " (did you mean 'key'?)"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "not enough memory",
        ),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "not enough memory"),
        (OSError(errno.EMFILE, "Too many open files", "/a/b"), "/a/b: too many open files; raise the limit"),
        (OSError(errno.EMFILE, "Too many open files"), "too many open files"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: no space is left on the disk; free some space"),
        (OSError(errno.EIO, "Input/output error"), "(input/output error); look whether the device is in order"),
        (RuntimeError("can't start new thread"), "no further process or thread"),
        (PermissionError(errno.EACCES, "Permission denied", "x" * 5000), "Permission denied"),
    ],
)
def test_what_the_machine_refuses_is_one_line_with_advice(error: Exception, words: str) -> None:
    refusal = refusal_of(error)
    assert refusal is not None
    assert words in str(refusal)
    assert len(str(refusal)) < 500


@pytest.mark.parametrize(
    ("error", "reason", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "No space left on device", "free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded", "free some space, or have the quota raised"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied", "give this user the right to write there"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system", "have the file system mounted for writing"),
        (OSError("no number"), "no number", "mend that"),
        (
            RuntimeError("can't start new thread"),
            "can't start new thread",
            "raise `ulimit -u`, end other programs, or lower the number of workers",
        ),
        (MemoryError(), "not enough memory", "close other programs, raise `ulimit -v`, or choose smaller sizes"),
        (ValueError("a\nb"), r"ValueError('a\nb')", "mend that"),
    ],
)
def test_a_write_that_fails_has_the_advice_of_its_own_reason(error: Exception, reason: str, advice: str) -> None:
    assert why_unwritten(error) == (reason, advice)


def test_the_advice_is_that_of_what_lies_behind_a_line() -> None:
    told = UserError("x: cannot be written")
    told.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert why_unwritten(told)[0] == "Disk quota exceeded"


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.EBADF, "Bad file descriptor"), ValueError("memory")]
)
def test_a_bug_stays_a_bug(error: Exception) -> None:
    assert refusal_of(error) is None
