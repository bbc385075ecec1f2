"""The weights a stage starts from: drawn from the seed, or read from a model directory; float32 in either case."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from keural.errors import UserError
from keural.model import CHATML_IDS, KeuralConfig, KeuralMoECausalLM, grow_vocabulary
from keural.train.parallel import experts_implementation

SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "sliding_window",
    "rope_parameters",
    "rms_norm_eps",
)
"""What must be the same in the recipe and in the model directory."""


def initial_model(
    config: KeuralConfig, directory: Path | None, seed: int, device: torch.device, compiled: bool
) -> KeuralMoECausalLM:
    """A float32 model on the CPU, ready to train on `device`.

    Random weights depend on `seed` alone, not on the number of ranks. A model from before the two ChatML ids gets rows for them, at
    the mean of the others. Raises `UserError` when `directory` holds a model of another shape or cannot be read whole.
    """
    config = copy.deepcopy(config)
    config._experts_implementation = experts_implementation(device, compiled)
    if directory is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return KeuralMoECausalLM(config)
    try:
        stored = KeuralConfig.from_pretrained(directory)
        wanted = config.vocab_size
        if stored.vocab_size == wanted - CHATML_IDS:
            config.vocab_size = stored.vocab_size
        _check_shape(directory, config, stored)
        with _without_progress_bars():
            model, info = KeuralMoECausalLM.from_pretrained(
                directory, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{directory}: no model to start from can be read there ({reason}); run the stage it comes from again"
        ) from error
    for problem, names in info.items():
        if names:
            raise UserError(
                f"{directory}: {problem.replace('_', ' ')}: {sorted(map(str, names))[0]}; the model directory is incomplete"
            )
    grow_vocabulary(model, wanted)
    return model


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Loading a model is one line among a stage's others, not a bar of transformers."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _check_shape(directory: Path, wanted: KeuralConfig, stored: KeuralConfig) -> None:
    for name in SHAPE:
        if getattr(wanted, name) != getattr(stored, name):
            raise UserError(
                f"{directory}: {name} is {getattr(stored, name)}, the recipe's model has {getattr(wanted, name)}; start from a "
                "model of the same shape"
            )
