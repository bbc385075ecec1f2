"""`keural init`: a randomly initialised model of any size, written tensor by tensor.

In: a configuration and a seed. Out: a model directory whose values are drawn as the network draws them. It is there to exercise
everything that takes a full-size model without having one; training starts from its own initialisation (`init_from: random`).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from keural.files import check_new
from keural.model import KeuralConfig
from keural.pretrained.directory import write_model_directory
from keural.pretrained.weights import TensorInfo, Weights, stored_tensors
from keural.recipe import ChatSpec
from keural.tokenizer import KeuralTokenizer

_BLOCK = 1 << 24
"""Values drawn at a time."""


def initialise(
    out: Path,
    config: KeuralConfig,
    tokenizer: KeuralTokenizer,
    *,
    recipe: str,
    chat: ChatSpec,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    advance: Callable[[int], None] = lambda count: None,
) -> Path:
    """Write a model with weights from N(0, initializer_range²) and norms at one; at most one tensor is in memory.

    Args:
        out: must not exist, or be empty.
        config: shape of the network.
        tokenizer: the recipe's.
        recipe: its name, for the lineage.
        chat: the recipe's defaults.
        seed: makes the values repeatable; each tensor has its own stream, drawn in float32 and rounded to `dtype`.
        dtype: what is stored.
        advance: told the bytes of every tensor that was made.

    Returns:
        `out`.

    Raises:
        UserError: when there is too little disk, `out` is not empty, or the tokenizer is not of the configuration's size.
    """
    weights = random_weights(config, seed, dtype)
    check_new(out, weights.nbytes)
    lineage = {"recipe": recipe, "stage": "random", "seed": seed, "chain": ["random"], "objectives": []}
    return write_model_directory(out, config, weights.watched(advance), tokenizer, lineage, chat)


def random_weights(config: KeuralConfig, seed: int, dtype: torch.dtype) -> Weights:
    """The tensors of a randomly initialised model directory, each drawn when it is read."""
    infos = {name: TensorInfo(shape, dtype) for name, shape in stored_tensors(config).items()}

    def read(name: str) -> Tensor:
        shape = infos[name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        tensor = torch.empty(shape, dtype=dtype)
        for block in tensor.view(-1).split(_BLOCK):
            block.copy_(torch.empty(block.shape).normal_(0.0, config.initializer_range, generator=generator))
        return tensor

    return Weights(infos, read)
