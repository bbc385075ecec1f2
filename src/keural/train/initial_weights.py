"""The weights a stage starts from: drawn from the seed, or read from a model directory; float32 in either case."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch

from keural.errors import UserError
from keural.model import CHATML_IDS, SHAPE, KeuralConfig, KeuralMoECausalLM, grow_vocabulary
from keural.pretrained.stored_model import build, open_network
from keural.train.parallel import experts_implementation

MUST_AGREE = (*SHAPE, "sliding_window", "rope_parameters", "rms_norm_eps")
"""What must be the same in the recipe and in the model directory."""


def initial_model(
    config: KeuralConfig,
    directory: Path | None,
    seed: int,
    device: torch.device,
    compiled: bool,
    say: Callable[[str], None] = lambda line: None,
) -> KeuralMoECausalLM:
    """A float32 model on the CPU, ready to train on `device`.

    Random weights depend on `seed` alone, not on the number of ranks. A model from before the two ChatML ids gets rows for them, at
    the mean of the others. `say` is told when not all of `directory` could be verified. Raises `UserError` when it holds a model of
    another shape, or as `open_network` does.
    """
    config = copy.deepcopy(config)
    config._experts_implementation = experts_implementation(device, compiled)
    if directory is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return KeuralMoECausalLM(config)
    stored, wanted = open_network(directory), config.vocab_size
    if stored.notice:
        say(stored.notice)
    if stored.config.vocab_size == wanted - CHATML_IDS:
        config.vocab_size = stored.config.vocab_size
    _check_shape(directory, config, stored.config)
    model = build(stored, torch.float32, config)
    grow_vocabulary(model, wanted)
    return model


def _check_shape(directory: Path, wanted: KeuralConfig, stored: KeuralConfig) -> None:
    for name in MUST_AGREE:
        if getattr(wanted, name) != getattr(stored, name):
            raise UserError(
                f"{directory}: {name} is {getattr(stored, name)}, the recipe's model has {getattr(wanted, name)}; start from a "
                "model of the same shape"
            )
