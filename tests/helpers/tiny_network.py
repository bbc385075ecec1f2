"""The tiny network of tests/model: what the fixtures are that make it, and its layers with their types."""

from collections.abc import Callable

import torch

from keural.model import KeuralConfig, KeuralMoECausalLM, KeuralMoEModel
from keural.model.modeling_keural import KeuralDecoderLayer

MakeConfig = Callable[..., KeuralConfig]
MakeModel = Callable[..., KeuralMoECausalLM]
Tokens = Callable[..., torch.Tensor]
"""Makes token ids ``[rows, length]``."""


def decoder_layers(model: KeuralMoECausalLM | KeuralMoEModel) -> list[KeuralDecoderLayer]:
    base = model.model if isinstance(model, KeuralMoECausalLM) else model
    return [layer for layer in base.layers if isinstance(layer, KeuralDecoderLayer)]
