"""`keural.json`: where a model comes from, how it wants to be talked to, and the checksums of its files.

In: what is known when a directory is written. Out: the file, and back, checked: it may come from somebody else, so every value that
is used later is of the right type, and names of files stay inside the directory.
"""

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

import keural
from keural.errors import UserError
from keural.files import read_json, sha256_file, write_json
from keural.recipe import ChatSpec, validate
from keural.tokenizer import KeuralTokenizer

LINEAGE = "keural.json"


def _plain(name: str) -> str:
    if not name or name in {".", ".."} or re.search(r"[/\\\0]", name):
        raise ValueError(f"{name!r} is no plain file name")
    return name


class Source(BaseModel):
    """The checkpoint that was imported, and how far its training had come."""

    model_config = ConfigDict(extra="allow", strict=True)

    file: str | None = None
    step: int | None = Field(None, ge=0)
    epoch: int | None = Field(None, ge=0)
    tokens_processed: int | None = Field(None, ge=0)


class Lineage(BaseModel):
    """The keys of `keural.json` that something reads; others are kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    recipe: str | None = None
    stage: str | None = None
    fingerprint: str | None = None
    chain: list[str] = Field(default_factory=list)
    """The stages that made the weights, oldest first."""
    source: Source | None = None
    chat: ChatSpec | None = None
    keural: str | None = None
    """Version of the package that wrote the directory."""
    transformers: str | None = None
    tokenizer_sha256: str | None = None
    files: dict[Annotated[str, AfterValidator(_plain)], str] = Field(default_factory=dict)
    """SHA-256 of each file of weights and of the tokenizer, by name."""


def read_record(directory: Path) -> dict[str, Any]:
    """What `keural.json` in `directory` says; empty where there is none. Raises `UserError` when it is damaged."""
    file = directory / LINEAGE
    if not file.is_file():
        return {}
    values = read_json(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a JSON object; the file is damaged, restore it or delete it")
    validate(Lineage, values, file)
    return values


def write_record(
    directory: Path, lineage: Mapping[str, Any], sums: Mapping[str, str], tokenizer: KeuralTokenizer | None, chat: ChatSpec
) -> None:
    """Write `keural.json`: what was given, versions, chat defaults, and checksums of weights (`sums`) and tokenizer."""
    sha256 = {} if tokenizer is None else {"tokenizer.model": tokenizer.sha256}
    record = {
        **lineage,
        "keural": keural.__version__,
        "transformers": version("transformers"),
        "tokenizer_sha256": sha256.get("tokenizer.model"),
        "chat": chat.model_dump(exclude={"samples"}),
        "files": {**sums, **sha256},
    }
    write_json(directory / LINEAGE, record)


def check_sums(directory: Path, names: Iterable[str] | None = None) -> None:
    """Compare the files of a directory with the checksums in its `keural.json`, where there is one.

    `names` are the files that must be listed and are compared; None stands for all that are listed. Raises `UserError` when a file
    is missing, not listed, or not the one that is listed.
    """
    listed = read_record(directory).get("files", {})
    if not listed:
        return
    for name in listed if names is None else names:
        file = directory / name
        if name not in listed:
            raise UserError(
                f"{file}: {LINEAGE} does not list it, so it was put there or renamed later; export again, or remove {LINEAGE}"
            )
        if not file.is_file():
            raise UserError(f"{file}: no such file, though {LINEAGE} lists it; copy or train the model again")
        if sha256_file(file) != listed[name]:
            raise UserError(
                f"{file}: does not match its checksum in {LINEAGE}; it is damaged or was changed, copy or train it again"
            )


def file_name(text: str) -> str:
    """`text` as part of a file's name: letters, digits, dots and dashes only."""
    return re.sub(r"[^\w.-]+", "-", text).strip(".-") or "model"
