"""A model directory, opened: what every exporter takes.

In: a path. Out: configuration, lazy weights, tokenizer and lineage, all of them checked against each other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keural.errors import UserError
from keural.model import KeuralConfig
from keural.pretrained.directory import directory_weights, load_tokenizer, read_config, read_lineage
from keural.pretrained.lineage import check_sums, file_name
from keural.pretrained.location import model_directory
from keural.pretrained.weights import Weights, finite
from keural.recipe import ChatSpec
from keural.tokenizer import KeuralTokenizer


@dataclass(frozen=True)
class StoredModel:
    """A model on disk whose parts fit each other."""

    directory: Path
    config: KeuralConfig
    weights: Weights
    tokenizer: KeuralTokenizer
    lineage: Mapping[str, Any]
    """What `keural.json` says; empty where there is none."""

    @property
    def chat(self) -> ChatSpec:
        """Sampling defaults and system message; the card's where the lineage names none."""
        return ChatSpec(**(self.lineage.get("chat") or {}))

    @property
    def name(self) -> str:
        """What the model is called in files: its recipe and stage, its source, or its directory."""
        recipe, stage = self.lineage.get("recipe"), self.lineage.get("stage")
        return file_name(f"{recipe}-{stage}" if recipe and stage else self.directory.name)

    def watched(self, advance: Callable[[int], None]) -> "StoredModel":
        """The same model; `advance` is told the bytes of every tensor that was read."""
        return StoredModel(self.directory, self.config, self.weights.watched(advance), self.tokenizer, self.lineage)


def open_model(path: Path, verify: bool = True) -> StoredModel:
    """Open a model, stage or run directory. With `verify`, the files' checksums are compared first.

    Raises `UserError` when tensors, configuration and tokenizer do not belong together, a file is damaged, or there is no
    tokenizer.
    """
    directory = model_directory(path)
    config = read_config(directory)
    weights = finite(directory, directory_weights(directory, config))
    if not (directory / "tokenizer.model").is_file():
        raise UserError(f"{directory}: has no tokenizer.model, which every export needs; import the model again with --tokenizer")
    tokenizer = load_tokenizer(directory)
    if verify:
        check_sums(directory)
    return StoredModel(directory, config, weights, tokenizer, read_lineage(directory))
