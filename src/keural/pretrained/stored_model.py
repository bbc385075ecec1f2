"""A model directory, opened: the one way in which the package reads a model.

In: a path. Out: configuration, lazy weights, tokenizer and lineage, all of them checked against the record and against each other;
and the network with these weights in it. What `inspect` describes and verifies, and what chat, evaluation, export and training
read, is therefore one and the same. Nothing is left to transformers' own search for files, which finds weights under other names
(`adapter_model.safetensors`, `pytorch_model.bin`, whatever `config.json` names), and no code of a directory is imported.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from keural.errors import UserError
from keural.files import read_object
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.model.modeling_keural import KeuralRotaryEmbedding
from keural.pretrained.directory import GENERATION, as_ends, quiet_transformers, read_config
from keural.pretrained.lineage import Coverage, check_sums, file_name, is_base, read_record
from keural.pretrained.location import model_directory
from keural.pretrained.safetensors import open_safetensors, weight_files
from keural.pretrained.tensor_names import HEAD
from keural.pretrained.weights import Weights, expected_tensors, finite, state_dict_weights
from keural.recipe import ChatSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.model_file import EOS_ID

TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class StoredNetwork:
    """Configuration and weights on disk that fit each other."""

    directory: Path
    config: KeuralConfig
    weights: Weights
    lineage: Mapping[str, Any]
    """What `keural.json` says; empty where there is none."""
    coverage: Coverage | None
    """What of the directory was verified; None where that was not asked for."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the weights."""
        return (self.directory / TOKENIZER).is_file()

    @property
    def ends(self) -> list[int]:
        """Where generation ends when the model is passed on: a base model's text at `</s>`, any other's turn at `<|im_end|>`.

        The latter goes for models whose training is not known, too: the model card allows no other end in a chat.
        """
        return [EOS_ID] if is_base(self.lineage) else as_ends(self.config.eos_token_id)

    @property
    def notice(self) -> str | None:
        """One line for the user where not all that is read was verified."""
        return None if self.coverage is None else self.coverage.notice

    @property
    def chat(self) -> ChatSpec:
        """Sampling defaults and system message; the card's where the lineage names none."""
        return ChatSpec(**(self.lineage.get("chat") or {}))

    @property
    def name(self) -> str:
        """What the model is called in files: its recipe and stage, its source, or its directory."""
        recipe, stage = self.lineage.get("recipe"), self.lineage.get("stage")
        return file_name(f"{recipe}-{stage}" if recipe and stage else self.directory.name)


@dataclass(frozen=True)
class StoredModel(StoredNetwork):
    """The same with the tokenizer of the model."""

    tokenizer: KeuralTokenizer

    def watched(self, advance: Callable[[int], None]) -> "StoredModel":
        """The same model; `advance` is told the bytes of every tensor that was read."""
        return replace(self, weights=self.weights.watched(advance))


def open_network(path: Path, verify: bool = True) -> StoredNetwork:
    """Open configuration and weights of a model, stage or run directory; a tokenizer is not needed.

    Args:
        path: see `model_directory`.
        verify: first compare every file with its checksum in `keural.json`, where there is one; `coverage` says what there was.

    Raises:
        UserError: for anything that is not exactly a Keural model: another architecture, a tensor that is missing, left over or
            mis-shaped, a damaged or changed file, a file that the record does not list. Reading a tensor that is not finite does
            so, too.
    """
    directory = model_directory(path)
    coverage = check_sums(directory) if verify else None
    config = read_config(directory)
    weights = finite(directory, directory_weights(directory, config))
    return StoredNetwork(directory, config, weights, read_record(directory), coverage)


def open_model(path: Path, verify: bool = True) -> StoredModel:
    """Open a model, stage or run directory with its tokenizer. Arguments and errors as for `open_network`.

    Raises `UserError` also when there is no tokenizer or it is another model's.
    """
    network = open_network(path, verify)
    if not network.has_tokenizer:
        raise UserError(f"{network.directory}: has no {TOKENIZER}, which this needs; import the model again with --tokenizer")
    parts = {name: getattr(network, name) for name in ("directory", "config", "lineage", "coverage")}
    return StoredModel(**parts, weights=network.weights, tokenizer=_tokenizer(network.directory, network.config))


def load_model(path: Path, dtype: torch.dtype | None = torch.float32, *, verify: bool = True) -> KeuralMoECausalLM:
    """Load a model directory strictly, on the CPU and in evaluation mode.

    Args:
        path: a model directory, a stage directory or a run directory (see `model_directory`).
        dtype: precision in memory; None keeps the stored one.
        verify: see `open_network`.

    Raises:
        UserError: as `open_network`, and for a tokenizer of another size.
    """
    stored = open_network(path, verify)
    if stored.has_tokenizer:
        _tokenizer(stored.directory, stored.config)
    return build(stored, dtype)


def build(
    stored: StoredNetwork, dtype: torch.dtype | None = torch.float32, config: KeuralConfig | None = None
) -> KeuralMoECausalLM:
    """The network with the stored weights in it, on the CPU and in evaluation mode; one tensor at a time is in memory beside it.

    Args:
        stored: what to read.
        dtype: precision in memory; None keeps the stored one.
        config: in place of the stored one, of the same shape.

    Raises:
        UserError: for a `generation_config.json` that transformers does not understand.
    """
    config = copy.deepcopy(config or stored.config)
    config.dtype = dtype or next(iter(stored.weights.infos.values())).dtype
    with torch.device("meta"):  # no memory is filled with random values that nothing reads
        model = KeuralMoECausalLM(config)
    model = model.to(config.dtype).to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = KeuralRotaryEmbedding(config)  # holds values that are in no file
    with torch.no_grad():
        for name, place in state_dict_weights(model.state_dict()):
            if name != HEAD or not config.tie_word_embeddings:
                place.copy_(stored.weights.read(name))
    model.generation_config = _generation(stored.directory) or model.generation_config
    found: KeuralMoECausalLM = model.eval()
    return found


def build_without_values(stored: StoredNetwork, config: KeuralConfig) -> KeuralMoECausalLM:
    """The network of `config`, which may have more ids than is stored, without memory for its parameters; for whoever fills it.

    Raises `UserError` as `build` does.
    """
    config = copy.deepcopy(config)
    config.dtype = torch.float32
    with torch.device("meta"):
        model = KeuralMoECausalLM(config)
    model.tie_weights()
    model.model.rotary_emb = KeuralRotaryEmbedding(config)
    model.generation_config = _generation(stored.directory) or model.generation_config
    found: KeuralMoECausalLM = model.eval()
    return found


def load_tokenizer(path: Path) -> KeuralTokenizer:
    """The tokenizer of a model directory. Raises `UserError` when it is missing or its vocabulary is not the model's."""
    directory = model_directory(path)
    return _tokenizer(directory, read_config(directory))


def _tokenizer(directory: Path, config: KeuralConfig) -> KeuralTokenizer:
    tokenizer = KeuralTokenizer.load(directory)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids and the model {config.vocab_size}; "
            "put the tokenizer there that the model was trained with"
        )
    return tokenizer


def _generation(directory: Path) -> GenerationConfig | None:
    file = directory / GENERATION
    if not file.is_file():
        return None
    try:
        with quiet_transformers():
            return GenerationConfig.from_dict(read_object(file))
    except UserError:
        raise
    except Exception as error:  # whatever transformers makes of values that only it knows
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file}: impossible settings ({reason}); restore or remove the file") from error


def read_lineage(path: Path) -> dict[str, Any]:
    """What `keural.json` says of a model, stage or run directory; empty where there is none. Raises `UserError`."""
    return read_record(model_directory(path))


def directory_weights(directory: Path, config: KeuralConfig) -> Weights:
    """The tensors of a model directory, read one at a time. Raises `UserError` when they are not those that `config` describes."""
    weights = open_safetensors(weight_files(directory))
    expected = expected_tensors(directory, config, weights)
    for name, shape in expected.items():
        if name not in weights.infos:
            raise UserError(f"{directory}: tensor {name} is missing; the weights do not belong to this config.json")
        found = weights.infos[name].shape
        if found != shape:
            raise UserError(f"{directory}: tensor {name} has shape {list(found)}, config.json asks for {list(shape)}")
    for name in weights.infos:
        if name not in expected:
            raise UserError(f"{directory}: tensor {name} is not part of the model that config.json describes")
    if len({info.dtype for info in weights.infos.values()}) > 1:
        raise UserError(f"{directory}: tensors of several types in one model; save it in one type")
    return weights
