"""`keural export`: a model directory in the form that somebody else's software reads.

In: a model, stage or run directory. Out: a new directory in one of `FORMATS`, whole or not at all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keural.errors import UserError, nearest
from keural.files import check_new
from keural.pretrained.location import check_kind, model_directory

if TYPE_CHECKING:
    from keural.pretrained.stored_model import StoredModel, StoredNetwork


@dataclass(frozen=True)
class ExportOptions:
    """What the formats can be told; each takes some of it and refuses the rest."""

    quantize: str | None = None
    """Number format of a GGUF file; see `keural.convert.ggml.QUANTIZATIONS`."""
    license_id: str | None = None
    """Licence of the weights, for the model card."""
    shard_bytes: int | None = None
    """Upper bound of one safetensors file."""
    scores: Callable[[], Mapping[str, Any] | None] = lambda: None
    """Finds what was measured of the model, by task, for the model card; formats without one do not ask."""


_FLAGS = {"quantize": "--quantize", "license_id": "--license", "shard_bytes": "--shard-gb"}
"""What the options are called on the command line."""

Advance = Callable[[int], None]
Writer = Callable[[Any, Path, ExportOptions, Advance], Path]
"""Gets a `StoredModel`; where no tokenizer is needed, a `StoredNetwork`."""


@dataclass(frozen=True)
class Format:
    """One format: who reads it, which options it has, and what writes it."""

    readers: str
    options: frozenset[str]
    write: Writer
    needs_tokenizer: bool = True
    """Whether a model without one cannot be written."""
    check: Callable[[ExportOptions], None] = lambda options: None
    """Refuses options, or a missing package, before the model is opened."""


def export(
    path: Path,
    out: Path,
    format_name: str,
    options: ExportOptions,
    advance: Advance = lambda count: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the model in `path` to the new directory `out`; returns the directory, or the file that is the model.

    `say` is told when not all that is read could be verified, and what of the model the format leaves behind.

    Raises `UserError` for an unknown format, an option that the format does not have, a model that cannot be written in it, damaged
    files, too little disk, and an `out` that is not empty.
    """
    if format_name not in FORMATS:
        raise UserError(f"--format {format_name}: unknown{nearest(format_name, FORMATS)}; known are {', '.join(FORMATS)}")
    chosen = FORMATS[format_name]
    for name, flag in _FLAGS.items():
        if getattr(options, name) is not None and name not in chosen.options:
            raise UserError(f"{flag} means nothing for --format {format_name}; leave it out")
    chosen.check(options)
    check_new(out)
    check_kind(model_directory(path))
    from keural.convert.carried import check_carried, left_behind
    from keural.pretrained.stored_model import open_model, open_network

    model = open_model(path) if chosen.needs_tokenizer else open_network(path)
    check_carried(model.config, format_name, str(path))
    if model.notice:
        say(model.notice)
    for line in left_behind(model.config, format_name):
        say(line)
    if not chosen.needs_tokenizer and not model.has_tokenizer:
        say(f"{path}: has no tokenizer, and so the export has none; whoever imports it to chat names one with --tokenizer")
    return chosen.write(model, out, options, advance)


def _write_hf(model: "StoredModel", out: Path, options: ExportOptions, advance: Advance) -> Path:
    from keural.convert.model_card import model_card
    from keural.pretrained.directory import DEFAULT_SHARD_BYTES, write_model_directory

    check_new(out, model.weights.nbytes)
    card = model_card(model, "hf", options.license_id, options.scores())
    write = partial(write_model_directory, shard_bytes=options.shard_bytes or DEFAULT_SHARD_BYTES, card=card)
    return write(out, model.config, model.watched(advance).weights, model.tokenizer, model.lineage, model.chat, ends=model.ends)


def _write_granite(model: "StoredModel", out: Path, options: ExportOptions, advance: Advance) -> Path:
    from keural.convert.granite import export_granite
    from keural.pretrained.directory import DEFAULT_SHARD_BYTES

    return export_granite(model, out, options.shard_bytes or DEFAULT_SHARD_BYTES, options.license_id, advance, options.scores())


def _check_gguf(options: ExportOptions) -> None:
    if find_spec("gguf") is None:
        raise UserError("--format gguf needs the gguf package: pip install 'keural[gguf]'")
    from keural.convert.ggml import check_known

    if options.quantize is not None:
        check_known(options.quantize)


def _write_gguf(model: "StoredModel", out: Path, options: ExportOptions, advance: Advance) -> Path:
    from keural.convert.gguf import export_gguf

    return export_gguf(model, out, options.quantize, advance)


def _write_pt(model: "StoredNetwork", out: Path, options: ExportOptions, advance: Advance) -> Path:
    from keural.convert.published_pt import export_pt
    from keural.pretrained.stored_model import load_tokenizer

    tokenizer = load_tokenizer(model.directory).model_bytes if model.has_tokenizer else None
    return export_pt(model, tokenizer, out, advance)


FORMATS: dict[str, Format] = {
    "hf": Format(
        "transformers with trust_remote_code, vLLM's transformers backend", frozenset({"license_id", "shard_bytes"}), _write_hf
    ),
    "granite": Format(
        "transformers, vLLM and SGLang without code of ours", frozenset({"license_id", "shard_bytes"}), _write_granite
    ),
    "gguf": Format("llama.cpp", frozenset({"quantize"}), _write_gguf, check=_check_gguf),
    "pt": Format("the published scripts", frozenset(), _write_pt, needs_tokenizer=False),
}
"""Names of `--format`."""
