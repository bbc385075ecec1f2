"""The model that servers elsewhere compute, as it is here: its tokenizer, and its `granite` export for an engine of ours.

In: a path. Out: what prompts are made with, and a directory that vLLM and SGLang read. An export is found only where it is that of
these very weights, and made whole or not at all.
"""

import contextlib
from pathlib import Path
from typing import NamedTuple

from keural.convert.carried import check_carried
from keural.convert.export import ExportOptions, export
from keural.errors import UserError
from keural.files import read_object, remembered_check
from keural.pretrained.directory import read_config
from keural.pretrained.lineage import check_sums, identity_of, read_record
from keural.pretrained.location import CONFIG, EXPORTED_TYPE, model_directory
from keural.pretrained.stored_model import load_tokenizer
from keural.terminal import byte_progress, note, say
from keural.tokenizer import KeuralTokenizer

GRANITE = "granite"


class FrontModel(NamedTuple):
    """What is known here of a model that is computed elsewhere."""

    directory: Path
    tokenizer: KeuralTokenizer
    context_length: int
    is_export: bool
    """Whether the directory is an export itself."""


def front_model(path: Path) -> FrontModel:
    """The model, stage or run directory, or `granite` export, at `path`; weights are not looked at. Raises `UserError`."""
    directory = model_directory(path)
    values = read_object(directory / CONFIG)
    if values.get("model_type") == EXPORTED_TYPE and read_record(directory).get("format") == GRANITE:
        return _exported(directory, values)
    config = read_config(directory)
    check_carried(config, GRANITE, str(path))
    return FrontModel(directory, load_tokenizer(directory), config.max_position_embeddings, False)


def _exported(directory: Path, values: dict[str, object]) -> FrontModel:
    tokenizer = KeuralTokenizer.load(directory)
    size, length = values.get("vocab_size"), values.get("max_position_embeddings")
    if size != tokenizer.vocab_size or not isinstance(length, int):
        raise UserError(f"{directory}: its {CONFIG} and its tokenizer are not of one model; export the model again")
    return FrontModel(directory, tokenizer, length, True)


def find_export(model: FrontModel, given: Path | None) -> Path:
    """The `granite` export of a model: itself, the one at `given`, or the one beside the model; made where there is none.

    Raises `UserError` where something else lies there, it is damaged, or it cannot be made.
    """
    place = model.directory if model.is_export else given or beside(model.directory)
    if not model.is_export and not _is_there(place):
        say(f"{place}: is made, the model as vLLM and SGLang read it")
        with byte_progress(place.name) as advance:
            export(model.directory, place, GRANITE, ExportOptions(), advance, note)
        return place
    if not model.is_export:
        _check_origin(place, model.directory)
    with contextlib.suppress(OSError):
        remembered_check(place, place.with_name(f"{place.name}.checked.json"), lambda: check_sums(place))
    return place


def beside(directory: Path) -> Path:
    """Where the export of a model directory lies unless another place is named."""
    return directory.with_name(f"{directory.name}-{GRANITE}")


def _is_there(place: Path) -> bool:
    return place.exists() and not (place.is_dir() and not any(place.iterdir()))


def _check_origin(place: Path, directory: Path) -> None:
    """Raise `UserError` unless `place` is the export of exactly the model in `directory`."""
    record = read_record(place) if place.is_dir() else {}
    if record.get("format") != GRANITE or record.get("exported_from") != identity_of(directory):
        raise UserError(
            f"{place}: is not the `granite` export of {directory} as it is now; move it away, or name another place with --export"
        )
