"""`keural.json`: where a model comes from, how it wants to be talked to, and the checksum of every file of its directory.

In: what is known when a directory is written. Out: the file, and back, checked: it may come from somebody else, so every value that
is used later is of the right type, and names of files stay inside the directory.

The record has a checksum of itself and lists every other file, so that no change of one place goes unseen: a changed or missing
file, a changed record, and a file that was put there later and would be read in place of another. None of these checksums has a
key: they tell damage and mix-ups, not a forger who writes the record anew. What a forged directory can do is bounded elsewhere:
nothing in it is ever run (`docs/trust.md`).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

import keural
from keural.errors import UserError
from keural.files import fingerprint, read_object, sha256_file, write_json
from keural.recipe import OBJECTIVES, ChatSpec, validate

LINEAGE = "keural.json"
RECORD = 2
"""Version of the record. 2 lists every file and has a checksum of itself; before, weights and tokenizer.model were listed alone."""
_LISTED_FROM_2 = frozenset(
    {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "configuration_keural.py",
        "generation_config.json",
        "keural_tokenizer.model",
        "model.safetensors.index.json",
        "modeling_keural.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
)
"""Files that the package wrote without listing them, before records of version 2."""
_DOCUMENT = re.compile(r"\..*|(README|LICENSE|LICENCE|NOTICE)([.-].*)?|.*\.md", re.IGNORECASE)
"""Files for people, which no program reads for the model: they may be added and edited. So may hidden ones (`.gitattributes`)."""
_SHOWN = 5
"""Names in one line."""


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
    objectives: list[str] = Field(default_factory=list)
    """What each stage of the chain was trained for, none for random weights; `unknown` stands for stages that no record tells."""
    tool_conversations: int | None = Field(None, ge=0)
    """Conversations and pairs with calls of tools that its stages were trained on; None where no record tells."""
    source: Source | None = None
    chat: ChatSpec | None = None
    record: int | None = None
    """Version of the record; see `RECORD`."""
    checksum: str | None = None
    """Of all the other keys."""
    keural: str | None = None
    """Version of the package that wrote the directory."""
    transformers: str | None = None
    tokenizer_sha256: str | None = None
    files: dict[Annotated[str, AfterValidator(_plain)], str] = Field(default_factory=dict)
    """SHA-256 of every other file of the directory, by name."""


UNKNOWN = "unknown"
"""Objective of stages that no record tells of."""


def is_base(lineage: Mapping[str, Any]) -> bool:
    """Whether a model is known to have been trained on documents alone, so that it ends a text with `</s>` and no turn."""
    objectives = lineage.get("objectives", [])
    return bool(objectives) and all(name in OBJECTIVES and OBJECTIVES[name].store == "documents" for name in objectives)


def trained_on_tools(lineage: Mapping[str, Any]) -> bool:
    """Whether a model is known to have been trained on calls of tools."""
    return bool(lineage.get("tool_conversations"))


@dataclass(frozen=True)
class Coverage:
    """What of a directory was compared with its record; `notice` says what was not."""

    directory: Path
    record: int | None
    """Version of the record; None where there is none."""
    verified: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()
    """Files that the record does not cover, or documents that were edited since."""

    def __str__(self) -> str:
        if self.record is None:
            return f"no record: nothing was verified ({LINEAGE} is missing)"
        if not self.uncovered:
            return f"all {len(self.verified)} files are as {LINEAGE} lists them"
        why = "" if self.record >= RECORD else ", which is of an earlier version"
        return f"{_listed(self.verified)} as {LINEAGE} lists them{why}; not verified: {_listed(self.uncovered)}"

    @property
    def notice(self) -> str | None:
        """One line for whoever uses a directory of which not all that is read was verified; None where all was."""
        if self.record is None:
            return f"{self.directory}: {self}"
        if self.record < RECORD:
            return f"{self.directory}: {self}; `keural export {self.directory} NEW --format hf` writes it with a whole record"
        return None


def _listed(names: Iterable[str]) -> str:
    """The first names, in characters that no terminal obeys, and how many more there are."""
    shown = [re.sub(r"[^\w.+-]", "?", name) for name in names]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def read_record(directory: Path) -> dict[str, Any]:
    """What `keural.json` in `directory` says; empty where there is none.

    Raises `UserError` when it is damaged, does not match its own checksum, lists no files, or is of a newer version.
    """
    file = directory / LINEAGE
    if not file.exists() and not file.is_symlink():
        return {}
    values = read_object(file)
    content = {key: value for key, value in values.items() if key != "checksum"}
    # Any trace of a newer record makes it one, so that no single changed key turns the checks off.
    if ("record" in values or "checksum" in values) and values.get("checksum") != fingerprint(content):
        raise UserError(f"{file}: does not match its own checksum; it is damaged or was changed, {_remedy(directory)}")
    validate(Lineage, values, file)
    if values.get("record", 1) > RECORD:
        raise UserError(f"{file}: written by a newer version of keural; install that version")
    if not values.get("files"):
        raise UserError(f"{file}: lists no files; it is damaged or was changed, {_remedy(directory)}")
    return values


def identity_of(directory: Path) -> dict[str, str]:
    """SHA-256, by name, of the files that decide what a model directory computes: as its record lists them, else of the files.

    Raises `UserError` when the record is damaged.
    """
    listed = read_record(directory).get("files", {})
    return {file.name: listed.get(file.name) or sha256_file(file) for file in _deciding(directory)}


def contents_of(directory: Path, sha256: Callable[[Path], str] = sha256_file, weights: bool = True) -> dict[str, str]:
    """SHA-256, by name, of the files that decide what a model directory computes, as they are there now, whatever is listed.

    `sha256` may remember what it read before; without `weights` those are left out. Raises `UserError` when the record is damaged,
    or one of the files is not the one that it lists.
    """
    listed = read_record(directory).get("files", {})
    found = {file.name: sha256(file) for file in _deciding(directory) if weights or file.suffix != ".safetensors"}
    for name, checksum in found.items():
        if listed.get(name, checksum) != checksum:
            raise _another(directory / name)
    return found


def _deciding(directory: Path) -> list[Path]:
    return sorted(file for file in directory.iterdir() if file.name in _DECIDING or file.suffix == ".safetensors")


_DECIDING = frozenset({"config.json", "tokenizer.model"})


def _remedy(directory: Path) -> str:
    return f"copy or export {directory} again, or remove {LINEAGE} to use the directory unverified"


def write_record(directory: Path, lineage: Mapping[str, Any], chat: ChatSpec, sums: Mapping[str, str] | None = None) -> None:
    """Write `keural.json`, last of all: what was given, versions, chat defaults, and the SHA-256 of every file in `directory`.

    `sums` are those that are known already.
    """
    known = sums or {}
    files = {file.name: known.get(file.name) or sha256_file(file) for file in sorted(directory.iterdir())}
    record = {
        **lineage,
        "record": RECORD,
        "keural": keural.__version__,
        "transformers": version("transformers"),
        "tokenizer_sha256": files.get("tokenizer.model", files.get("keural_tokenizer.model")),
        "chat": _chat_of(chat, lineage),
        "files": files,
    }
    _write(directory, record)


def _chat_of(chat: ChatSpec, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """How a model wants to be talked to; what one that reads documents alone cannot answer is not suggested."""
    suggests = bool(chat.suggestions) and not is_base(lineage)
    return chat.model_dump(exclude={"samples"} if suggests else {"samples", "suggestions"})


def suggestions_of(directory: Path) -> list[str]:
    """What the record in `directory` suggests to ask; nothing where it says nothing. Raises `UserError` when it is damaged."""
    found: list[str] = (read_record(directory).get("chat") or {}).get("suggestions", [])
    return found


def list_again(directory: Path, names: Iterable[str]) -> None:
    """Let the record list files as they are now, where it lists them; nothing else is looked at. Raises `UserError`."""
    record = read_record(directory)
    sums = {name: sha256_file(directory / name) for name in names if name in record.get("files", {})}
    if any(record["files"][name] != checksum for name, checksum in sums.items()):
        _write(directory, {**record, "files": {**record["files"], **sums}})


def _write(directory: Path, record: Mapping[str, Any]) -> None:
    content = {key: value for key, value in record.items() if key != "checksum"}
    write_json(directory / LINEAGE, {**content, "checksum": fingerprint(content)})


def check_sums(directory: Path, names: Collection[str] = ()) -> Coverage:
    """Compare every file of a directory with the checksums in its `keural.json`; says what there was to compare.

    Raises `UserError` when the record is damaged, a listed file is missing or another, or there is a file that the record does not
    list and a program might read. `names` must be listed, too.
    """
    record = read_record(directory)
    if not record:
        return Coverage(directory, None)
    listed: dict[str, str] = record["files"]
    number = record.get("record", 1)
    earlier = _LISTED_FROM_2 if number < RECORD else frozenset()
    present = {file.name for file in directory.iterdir()} - {LINEAGE}
    for name in sorted((present | set(names)) - listed.keys()):
        if name in names or not (name in earlier or _DOCUMENT.fullmatch(name)):
            raise UserError(
                f"{directory / name}: {LINEAGE} does not list it, so it was put there or renamed later, and might be read in place "
                f"of another file; move it away, or remove {LINEAGE} to use the directory unverified"
            )
    edited = [name for name in listed if not _as_listed(directory / name, listed[name])]
    verified = sorted(listed.keys() - set(edited))
    return Coverage(directory, number, tuple(verified), tuple(sorted({*edited, *(present - listed.keys())})))


def _as_listed(file: Path, checksum: str) -> bool:
    """Whether a listed file is the one that was listed; only a document may be another, or gone. Raises `UserError`."""
    document = _DOCUMENT.fullmatch(file.name) is not None
    if not file.is_file():
        if document:
            return False
        raise UserError(f"{file}: no such file, though {LINEAGE} lists it; copy or train the model again")
    if sha256_file(file) == checksum:
        return True
    if document:
        return False
    raise _another(file)


def _another(file: Path) -> UserError:
    """What to say of a file that is not the one that was listed."""
    return UserError(
        f"{file}: does not match its checksum in {LINEAGE}; it is damaged or was changed: copy or train it again, or remove "
        f"{LINEAGE} to use the directory unverified"
    )


def file_name(text: str) -> str:
    """`text` as part of a file's name: letters, digits, dots and dashes only."""
    return re.sub(r"[^\w.-]+", "-", text).strip(".-") or "model"
