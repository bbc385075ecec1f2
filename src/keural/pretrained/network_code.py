"""The network's code beside the weights: what a model directory runs where this package is not installed.

In: a model directory. Out: whether its code is this package's, a line that says so when it is not, and the package's code in its
place. This package never runs the code of a directory; whoever loads one with `trust_remote_code=True` does. Torch is not needed.
"""

from pathlib import Path

from keural.errors import UserError
from keural.files import fingerprint, sha256_file, write_atomic
from keural.pretrained.lineage import list_again
from keural.pretrained.location import check_kind, model_directory

NETWORK_CODE = ("configuration_keural.py", "modeling_keural.py")
"""The files, the one that the other imports first."""
PACKAGE = Path(__file__).parents[1] / "model"


def package_code() -> str:
    """Fingerprint of this package's network code."""
    return _checksum(PACKAGE)


def has_other_code(directory: Path) -> bool:
    """Whether a model directory carries network code that is not this package's; one without any carries none."""
    found = [(directory / name).is_file() for name in NETWORK_CODE]
    return any(found) and (not all(found) or _checksum(directory) != package_code())


def other_code_line(path: Path) -> str | None:
    """One line about the code of the model that `path` stands for: what is wrong with it and what to do. None where all is well."""
    try:
        directory = model_directory(path)
    except UserError:  # a GGUF file, which carries no code
        return None
    if not has_other_code(directory):
        return None
    return (
        f"{directory}: carries other network code than this package, from an earlier export or changed since; this package runs "
        "its own, but other programs run what is there, and earlier code generates wrong text under transformers 5.24 and newer: "
        f"`keural refresh-code {path}` puts this package's there"
    )


def refresh_code(path: Path) -> bool:
    """Put this package's network code into the model directory that `path` stands for; says whether anything had to change.

    Each file is replaced atomically, and the record of the directory then lists what is there. Raises `UserError` when there is no
    Keural model or the directory cannot be written to.
    """
    directory = model_directory(path)
    check_kind(directory)
    if not any((directory / name).is_file() for name in NETWORK_CODE):
        raise UserError(f"{directory}: carries no network code, and so none that could be renewed; `keural export` writes some")
    other = has_other_code(directory)
    if other:
        for name in NETWORK_CODE:
            write_atomic(directory / name, (PACKAGE / name).read_bytes())
    list_again(directory, NETWORK_CODE)
    return other


def _checksum(directory: Path) -> str:
    return fingerprint({name: sha256_file(directory / name) for name in NETWORK_CODE})
