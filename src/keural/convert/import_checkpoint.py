"""`keural import`: a foreign checkpoint becomes a model directory, tensor by tensor, or is refused with the list of what is wrong.

In: a `Checkpoint` (published training checkpoint, or safetensors with its names, with a `model.` prefix, or with ours). Out: a
directory as every other command takes it. Nothing is guessed: names, shapes and configuration must describe one and the same Keural
model, the head must be the embedding, and every value must be finite.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from keural import terminal
from keural.convert.foreign_checkpoint import Checkpoint, open_checkpoint
from keural.errors import UserError, listed
from keural.files import check_new, read_object
from keural.model import CHATML_IDS, KeuralConfig, with_mean_rows
from keural.model.config_fields import FIELDS
from keural.model.configuration_keural import PUBLISHED_BASE_VOCABULARY
from keural.pretrained.directory import configuration, write_model_directory
from keural.pretrained.lineage import UNKNOWN, read_record
from keural.pretrained.location import CONFIG, check_type
from keural.pretrained.tensor_names import EMBEDDING, HEAD, is_published, stored_name
from keural.pretrained.weights import TensorInfo, Weights, expected_tensors
from keural.tokenizer import KeuralTokenizer

PUBLISHED_WINDOW = 512
"""`sliding_window` of the published configuration: keys before the token, which sees itself, too."""
TOKENIZER_FILES = ("tokenizer.model", "keural_tokenizer.model")
_CONFIG_KEYS = (frozenset(FIELDS) | {"rope_theta", "num_experts"}) - {"eos_token_id"}
_UNUSED_KEYS = frozenset(PreTrainedConfig().to_dict()) | frozenset(
    {"architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version", "eos_token_id"}
)
"""Keys of a foreign configuration that say nothing of the network; the ends of texts follow from the vocabulary."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "mlp_bias": (False,),
    "n_shared_experts": (0, None),
    "norm_topk_prob": (True,),
    "rope_scaling": (None,),
    "router_jitter_noise": (0, None),
    "shared_intermediate_size": (0, None),
}
"""Keys of related models, and the values with which they change nothing here."""

Say = Callable[[str], None]


def import_checkpoint(
    source: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    config: Path | None = None,
    grow_vocabulary: bool = False,
    sliding_window: int | None = None,
    verify: bool = True,
    say: Say = terminal.say,
    advance: Callable[[int], None] = lambda count: None,
) -> Path:
    """Convert the checkpoint `source` into the model directory `out`; at most one tensor is in memory.

    Args:
        source: see `open_checkpoint`.
        out: must not exist, or be empty.
        tokenizer: SentencePiece model or directory with one; None looks beside the checkpoint. Without any, the directory has none.
        config: JSON file with the configuration, in place of the one that came with the checkpoint.
        grow_vocabulary: append two rows for the ChatML ids, each the mean of the others.
        sliding_window: keys that a token of a sliding layer sees, itself included, in place of what the configuration says.
        verify: compare the checksums inside a `.pt`, and those of `keural.json` beside it, first.
        say: told, line by line, what was read and how it was understood.
        advance: told the bytes of every tensor that was read.

    Returns:
        `out`.

    Raises:
        UserError: with the list of missing, unexpected, duplicate, mis-shaped or non-finite tensors; for a head that is not the
            embedding, a configuration of another architecture or that contradicts the tensors, a tokenizer of another size, too
            little disk, or an `out` that is not empty. Nothing is left behind.
    """
    check_new(out)
    checkpoint = open_checkpoint(source, verify)
    none = "none came with it: nothing was verified" if verify else "not compared (--no-verify)"
    say(f"checksums: {checkpoint.verified or none}")
    weights = _renamed(checkpoint)
    values = checkpoint.config if config is None else read_object(config)
    shape = _configuration(checkpoint, values, weights, sliding_window, say)
    _check_tensors(checkpoint.where, shape, weights)
    weights = _without_head(checkpoint.where, weights)
    if grow_vocabulary and tokenizer is None and shape.vocab_size != PUBLISHED_BASE_VOCABULARY:
        raise UserError(
            f"--grow-vocabulary: the model has {shape.vocab_size:,} ids, not the published {PUBLISHED_BASE_VOCABULARY:,}; name its "
            "tokenizer with --tokenizer, so that it is certain that the two ids are missing"
        )
    if grow_vocabulary:
        shape, weights = _grown(checkpoint.where, shape, weights)
        say(f"vocabulary: {shape.vocab_size - CHATML_IDS:,} ids and {CHATML_IDS} new rows at their mean")
    named = read_record(checkpoint.directory).get("tokenizer_sha256") if verify else None
    found = _tokenizer(checkpoint, tokenizer, named, shape, say)
    check_new(out, weights.nbytes)
    lineage: dict[str, Any] = {
        "source": {"file": checkpoint.where.name, **checkpoint.progress},
        "chain": [f"import {checkpoint.where.name}"],
        # Rows for the ChatML ids that are made here have been taught nothing: what grows is a base model.
        "objectives": ["next_token"] if grow_vocabulary else _objectives(checkpoint) if verify else [UNKNOWN],
    }
    tools = read_record(checkpoint.directory).get("tool_conversations") if verify and not grow_vocabulary else None
    if tools is not None:
        lineage["tool_conversations"] = tools
    write_model_directory(out, shape, _finite(checkpoint.where, weights.watched(advance)), found, lineage)
    say(f"{out}: {len(weights.infos):,} tensors, {weights.nbytes / 1e9:.2f} GB")
    return out


def _objectives(checkpoint: Checkpoint) -> list[str]:
    """What the record beside a checkpoint says that it was trained for."""
    return list(read_record(checkpoint.directory).get("objectives", [UNKNOWN]))


def _renamed(checkpoint: Checkpoint) -> Weights:
    """The weights under the names of a model directory. Raises `UserError` when two tensors mean the same."""
    weights = checkpoint.weights
    originals = {name: stored_name(name) for name in weights.infos}
    twice = sorted(name for name, count in Counter(originals.values()).items() if count > 1)
    if twice:
        clashes = [name for name, stored in originals.items() if stored in twice]
        raise UserError(f"{checkpoint.where}: duplicate tensors: {listed(clashes)}")
    back = {stored: name for name, stored in originals.items()}
    return Weights({stored: weights.infos[name] for stored, name in back.items()}, lambda stored: weights.read(back[stored]))


def _configuration(
    checkpoint: Checkpoint, values: Mapping[str, Any] | None, weights: Weights, window: int | None, say: Say
) -> KeuralConfig:
    """The configuration of the checkpoint in this package's conventions; what is not said is as published."""
    values = dict(values or {})
    check_type(checkpoint.where, {"model_type": KeuralConfig.model_type, **values})
    unknown = sorted(str(key) for key, value in values.items() if not _understood(key, value))
    if unknown:
        raise UserError(
            f"{checkpoint.where}: its configuration has settings that this network does not know: {listed(unknown)}; if they mean "
            "nothing, give a configuration without them with --config"
        )
    known = {name: value for name, value in values.items() if name in _CONFIG_KEYS}
    if not values:
        say(f"configuration: none came with the checkpoint; the published one is assumed where the tensors do not say ({CONFIG})")
        if EMBEDDING in weights.infos and len(weights.infos[EMBEDDING].shape) == 2:
            known["vocab_size"] = weights.infos[EMBEDDING].shape[0]
    if window is not None:
        known["sliding_window"] = window
    elif (read := _window(checkpoint, known.get("sliding_window", PUBLISHED_WINDOW))) != known.get("sliding_window"):
        say(
            f"sliding_window: {known.get('sliding_window', PUBLISHED_WINDOW)} earlier tokens and the token itself, "
            f"written {read} here"
        )
        known["sliding_window"] = read
    if known.pop("tie_word_embeddings", True) is False and HEAD not in weights.infos:
        raise UserError(f"{checkpoint.where}: its configuration says that the head is not tied, and {HEAD} is missing")
    return configuration(checkpoint.where, known)


def _understood(key: object, value: object) -> bool:
    """Whether a configuration's entry is one of ours, or changes nothing."""
    return key in _CONFIG_KEYS or key in _UNUSED_KEYS or (key in _NEUTRAL and value in _NEUTRAL[str(key)])


def _window(checkpoint: Checkpoint, stated: int | None) -> int | None:
    """`sliding_window` with the token itself counted.

    The published code blocks only distances above its value, so files of its layout say one less than transformers counts. Files in
    our layout that this package did not write are taken at their word, except for the published value itself.
    """
    if not isinstance(stated, int) or checkpoint.ours:
        return stated  # what is no number is refused with the rest of the configuration
    published = any(is_published(name) for name in checkpoint.weights.infos)
    return stated + 1 if published or stated == PUBLISHED_WINDOW else stated


def _check_tensors(where: Path, config: KeuralConfig, weights: Weights) -> None:
    """Raise `UserError` with all that is missing, left over or mis-shaped against the configuration."""
    expected, found = expected_tensors(where, config, weights), weights.infos
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected and name != HEAD],
        "mis-shaped": [
            f"{name} {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
    }
    told = "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names)
    if told:
        raise UserError(f"{where}: the tensors are not those of its configuration: {told} (another configuration: --config)")
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in found.values()})
    if len(dtypes) > 1:
        raise UserError(f"{where}: tensors of {' and '.join(dtypes)} in one checkpoint; save it in one type")


def _without_head(where: Path, weights: Weights) -> Weights:
    """The weights less the head, which must be the embedding. Raises `UserError` when it is not."""
    if HEAD not in weights.infos:
        return weights
    embedding, head = weights.infos[EMBEDDING], weights.infos[HEAD]
    if head.shape != embedding.shape or not torch.equal(weights.read(HEAD), weights.read(EMBEDDING)):
        raise UserError(f"{where}: {HEAD} is not the embedding; the head of a Keural model is tied, so this is another model")
    return replace(weights, infos={name: info for name, info in weights.infos.items() if name != HEAD})


def _grown(where: Path, config: KeuralConfig, weights: Weights) -> tuple[KeuralConfig, Weights]:
    """Configuration and weights with two more ids, their rows at the mean of the others."""
    values = config.to_dict()
    del values["eos_token_id"]
    grown = KeuralConfig.from_dict({**values, "vocab_size": config.vocab_size + CHATML_IDS})
    info = weights.infos[EMBEDDING]
    infos = {**weights.infos, EMBEDDING: TensorInfo((grown.vocab_size, info.shape[1]), info.dtype)}

    def read(name: str) -> Tensor:
        tensor = weights.read(name)
        return with_mean_rows(tensor, CHATML_IDS) if name == EMBEDDING else tensor

    return grown, Weights(infos, read)


def _tokenizer(
    checkpoint: Checkpoint, given: Path | None, named: str | None, config: KeuralConfig, say: Say
) -> KeuralTokenizer | None:
    """The tokenizer that was given or lies beside the checkpoint. Raises `UserError` when it is not the model's.

    `named` is the SHA-256 of the one that the record beside the checkpoint names.
    """
    beside = (checkpoint.directory / name for name in TOKENIZER_FILES)
    path = given or next((file for file in beside if file.is_file()), None)
    if path is None:
        say("tokenizer: none found; without one the model cannot chat (give one with --tokenizer)")
        return None
    tokenizer = KeuralTokenizer.load(path)
    if tokenizer.vocab_size == config.vocab_size + CHATML_IDS:
        raise UserError(
            f"{path}: has {tokenizer.vocab_size:,} ids with the two of ChatML, the model {config.vocab_size:,} without; "
            "add rows for them with --grow-vocabulary"
        )
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{path}: has {tokenizer.vocab_size:,} ids and the model {config.vocab_size:,}; give the model's own tokenizer"
        )
    if named not in (None, tokenizer.sha256):
        raise UserError(
            f"{path}: is another tokenizer (SHA-256 {tokenizer.sha256[:12]}…) than keural.json beside the checkpoint names "
            f"({str(named)[:12]}…), though of the same size; give the model's own, or --no-verify to take this one"
        )
    say(f"tokenizer: {path}, {tokenizer.kind}")
    return tokenizer


def _finite(where: Path, weights: Weights) -> Weights:
    """The same weights; after the last one `UserError` is raised when any held an infinity or NaN."""
    bad: list[str] = []
    last = list(weights.infos)[-1]

    def read(name: str) -> Tensor:
        tensor = weights.read(name)
        if not torch.isfinite(tensor).all():
            bad.append(name)
        if name == last and bad:
            raise UserError(
                f"{where}: {len(bad)} tensors with values that are not finite: {listed(bad)}; the checkpoint is unusable"
            )
        return tensor

    return replace(weights, read=read)
