"""`keural export`: a model directory in the form that somebody else's software reads.

In: a model, stage or run directory. Out: a new directory in one of `FORMATS`, whole or not at all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from keural.convert.model_card import model_card
from keural.errors import UserError, nearest
from keural.files import check_new
from keural.pretrained.directory import DEFAULT_SHARD_BYTES, write_model_directory
from keural.pretrained.stored_model import StoredModel, open_model


@dataclass(frozen=True)
class ExportOptions:
    """What the formats can be told; each takes some of it and refuses the rest."""

    quantize: str | None = None
    """Number format of a GGUF file; see `keural.convert.ggml.QUANTIZATIONS`."""
    license_id: str | None = None
    """Licence of the weights, for the model card."""
    shard_bytes: int | None = None
    """Upper bound of one safetensors file."""


_FLAGS = {"quantize": "--quantize", "license_id": "--license", "shard_bytes": "--shard-gb"}
"""What the options are called on the command line."""

Advance = Callable[[int], None]
Writer = Callable[[StoredModel, Path, ExportOptions, Advance], Path]


@dataclass(frozen=True)
class Format:
    """One format: who reads it, which options it has, and what writes it."""

    readers: str
    options: frozenset[str]
    write: Writer


def export(
    path: Path,
    out: Path,
    format_name: str,
    options: ExportOptions,
    advance: Advance = lambda count: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the model in `path` to the new directory `out`; returns the directory, or the file that is the model.

    `say` is told when not all that is read could be verified.

    Raises `UserError` for an unknown format, an option that the format does not have, a model that cannot be written in it, damaged
    files, too little disk, and an `out` that is not empty.
    """
    if format_name not in FORMATS:
        raise UserError(f"--format {format_name}: unknown{nearest(format_name, FORMATS)}; known are {', '.join(FORMATS)}")
    chosen = FORMATS[format_name]
    for name, value in vars(options).items():
        if value is not None and name not in chosen.options:
            raise UserError(f"{_FLAGS[name]} means nothing for --format {format_name}; leave it out")
    check_new(out)
    model = open_model(path)
    if model.notice:
        say(model.notice)
    return chosen.write(model, out, options, advance)


def _write_hf(model: StoredModel, out: Path, options: ExportOptions, advance: Advance) -> Path:
    check_new(out, model.weights.nbytes)
    card = model_card(model, "hf", options.license_id)
    write = partial(write_model_directory, shard_bytes=options.shard_bytes or DEFAULT_SHARD_BYTES, card=card)
    return write(out, model.config, model.watched(advance).weights, model.tokenizer, model.lineage, model.chat)


def _write_granite(model: StoredModel, out: Path, options: ExportOptions, advance: Advance) -> Path:
    from keural.convert.granite import export_granite

    return export_granite(model, out, options.shard_bytes or DEFAULT_SHARD_BYTES, options.license_id, advance)


def _write_gguf(model: StoredModel, out: Path, options: ExportOptions, advance: Advance) -> Path:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("--format gguf needs the gguf package: pip install 'keural[gguf]'") from error
    from keural.convert.gguf import export_gguf

    return export_gguf(model, out, options.quantize, advance)


def _write_pt(model: StoredModel, out: Path, options: ExportOptions, advance: Advance) -> Path:
    from keural.convert.published_pt import export_pt

    return export_pt(model, out, advance)


FORMATS: dict[str, Format] = {
    "hf": Format(
        "transformers with trust_remote_code, vLLM's transformers backend", frozenset({"license_id", "shard_bytes"}), _write_hf
    ),
    "granite": Format(
        "transformers, vLLM and SGLang without code of ours", frozenset({"license_id", "shard_bytes"}), _write_granite
    ),
    "gguf": Format("llama.cpp", frozenset({"quantize"}), _write_gguf),
    "pt": Format("the published scripts", frozenset(), _write_pt),
}
"""Names of `--format`."""
