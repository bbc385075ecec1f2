"""Model directories in the Hugging Face layout: what a stage leaves behind and every later command takes.

In: a configuration, a state dict with fused experts, a tokenizer. Out: a directory that `AutoModelForCausalLM` and `AutoTokenizer`
load without this package (`trust_remote_code=True`). `stored_model.py` reads it back.

    config.json  generation_config.json  model*.safetensors (one matrix per expert, no head)  configuration_keural.py
    modeling_keural.py  tokenizer.model  tokenizer.json  tokenizer_config.json  chat_template.jinja  keural.json (the record)
"""

import contextlib
import copy
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from keural.errors import UserError
from keural.files import atomic_directory, write_atomic
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.lineage import write_record
from keural.pretrained.location import CONFIG, check_kind
from keural.pretrained.network_code import NETWORK_CODE, PACKAGE
from keural.pretrained.safetensors import write_shards
from keural.pretrained.tensor_names import HEAD
from keural.pretrained.weights import Weights, state_dict_weights, stored_tensors
from keural.recipe import ChatSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.model_file import EOS_ID

AUTO_MAP = {
    "AutoConfig": "configuration_keural.KeuralConfig",
    "AutoModel": "modeling_keural.KeuralMoEModel",
    "AutoModelForCausalLM": "modeling_keural.KeuralMoECausalLM",
}
GENERATION = "generation_config.json"
_CONFIG_KEYS = frozenset(KeuralConfig(num_hidden_layers=1).to_dict()) | {"auto_map", "num_experts", "rope_theta", "torch_dtype"}
"""What a configuration may say. transformers obeys other keys without asking, `attn_implementation` among them, whose value may
name code on a hub, which it fetches and runs."""
DEFAULT_SHARD_BYTES = 5_000_000_000


def save_model_directory(
    out: Path,
    config: KeuralConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer: KeuralTokenizer,
    lineage: Mapping[str, Any],
    chat: ChatSpec | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Write the model directory of a network in memory; see `write_model_directory`.

    `state_dict` is that of a `KeuralMoECausalLM`, experts fused, on any device, stored in its dtype; the tied head may be left out.
    """
    kept = {name: tensor for name, tensor in state_dict.items() if name != HEAD or not config.tie_word_embeddings}
    return write_model_directory(out, config, state_dict_weights(kept), tokenizer, lineage, chat, shard_bytes)


def write_model_directory(
    out: Path,
    config: KeuralConfig,
    weights: Weights,
    tokenizer: KeuralTokenizer | None,
    lineage: Mapping[str, Any],
    chat: ChatSpec | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    card: str | None = None,
    ends: Sequence[int] | None = None,
) -> Path:
    """Write a complete model directory, atomically: `out` appears whole or not at all, and replaces an earlier one.

    Args:
        out: the directory to write.
        config: shape of the network; its `vocab_size` must be the tokenizer's.
        weights: the tensors of a model directory (`stored_tensors`), read one at a time.
        tokenizer: saved next to the weights; None leaves the directory without one.
        lineage: where the weights come from (recipe, stage, fingerprints), kept in `keural.json` beside checksums and versions.
        chat: sampling defaults and system message of the model's chats; None stands for the card's.
        shard_bytes: upper bound of one weight file, unless a single tensor is larger.
        card: README of a directory that is passed on.
        ends: ids at which generation ends; None stands for the configuration's and `</s>`: a stage's own directory may hold a base
            model or one that chats.

    Returns:
        `out`.

    Raises:
        UserError: when the vocabularies differ or the disk refuses a write.
    """
    if tokenizer is not None and config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{out}: the model's vocabulary ({config.vocab_size}) is not the tokenizer's ({tokenizer.vocab_size}); use the "
            "tokenizer the model was trained with, or grow the vocabulary first"
        )
    expected = stored_tensors(config)
    assert {name: info.shape for name, info in weights.infos.items()} == expected, (
        "not the tensors that the configuration describes"
    )
    chat = chat or ChatSpec()
    described = copy.deepcopy(config)
    described.auto_map = dict(AUTO_MAP)
    described.architectures = [KeuralMoECausalLM.__name__]
    described.dtype = next(iter(weights.infos.values())).dtype
    with quiet_transformers(), atomic_directory(out) as directory:
        sums = write_shards(directory, Weights({name: weights.infos[name] for name in expected}, weights.read), shard_bytes)
        described.save_pretrained(directory)
        generation_config(config, chat, [*as_ends(config.eos_token_id), EOS_ID] if ends is None else ends).save_pretrained(
            directory
        )
        for name in NETWORK_CODE:
            shutil.copyfile(PACKAGE / name, directory / name)
        if tokenizer is not None:
            tokenizer.save(directory)
        if card is not None:
            write_atomic(directory / "README.md", card)
        write_record(directory, lineage, chat, sums)
    return out


def as_ends(token_ids: int | list[int] | None) -> list[int]:
    """An `eos_token_id` as a list: a configuration may say none, one or several."""
    return [] if token_ids is None else list(token_ids) if isinstance(token_ids, list) else [token_ids]


def generation_config(config: KeuralConfig, chat: ChatSpec, ends: Sequence[int]) -> GenerationConfig:
    """Sampling defaults; generation ends at any of `ends`."""
    ends = list(dict.fromkeys(ends))
    return GenerationConfig(
        do_sample=chat.temperature > 0,
        temperature=chat.temperature or None,
        top_p=chat.top_p if chat.temperature > 0 else None,
        top_k=0 if chat.temperature > 0 else None,  # transformers would otherwise cut at 50
        repetition_penalty=chat.repetition_penalty,
        max_new_tokens=chat.max_new_tokens,
        eos_token_id=(ends[0] if len(ends) == 1 else ends) if ends else None,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
    )


def read_config(directory: Path) -> KeuralConfig:
    """The configuration of a model directory. Raises `UserError` when it is missing, of another architecture or impossible."""
    return configuration(directory / CONFIG, check_kind(directory))


def configuration(where: Path, values: Mapping[str, Any]) -> KeuralConfig:
    """The configuration that `values` from a file describe. Raises `UserError`, naming `where`, when there is none such."""
    if unknown := sorted(values.keys() - _CONFIG_KEYS):
        raise UserError(
            f"{where}: has settings that this network does not know: {', '.join(unknown)[:300]}; where the weights "
            "were trained with them this network cannot compute what they do, and where not, take them out"
        )
    try:
        with quiet_transformers():
            found: KeuralConfig = KeuralConfig.from_dict(dict(values))
            return found
    except Exception as error:  # transformers checks some values and stumbles over others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: impossible configuration ({reason[:300]})") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside the block."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
