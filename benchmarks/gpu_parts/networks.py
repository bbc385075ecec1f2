"""Networks of random weights on a device, micro-batches for them, and the engine over both.

In: a configuration. Out: weights, rows of documents, and a function that adds one micro-batch's gradients.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.gpu_parts.bench import BF16, Size
from keural.model import KeuralConfig
from keural.train.network.attention import Packing, packing
from keural.train.network.block import BlockWeights, Network, settings_of, windows_of
from keural.train.network.head import label_logprobs
from keural.train.network.layers import forward


def random_network(config: KeuralConfig, device: torch.device, dtype: torch.dtype = BF16, scale: float = 0.02) -> Network:
    """Weights on the device: matrices N(0, scale^2) in `dtype`, gains and routers in float32 (float64 with float64)."""
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    assert config.head_dim is not None
    width, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def matrix(*shape: int, kind: torch.dtype = dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, device=device, dtype=kind).normal_(0, scale, generator=generator))

    def gain() -> nn.Parameter:
        return nn.Parameter(torch.ones(hidden, device=device, dtype=wide))

    layers = tuple(
        BlockWeights(
            gain(), matrix(width, hidden), matrix(kv, hidden), matrix(kv, hidden), matrix(hidden, width), gain(),
            matrix(experts, hidden, kind=wide), matrix(experts, 2 * inner, hidden), matrix(experts, hidden, inner),
        )
        for _ in range(config.num_hidden_layers)
    )  # fmt: skip
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    return Network(matrix(config.vocab_size, hidden), layers, gain(), frequencies)


def parameters(network: Network) -> list[nn.Parameter]:
    """All weights."""
    tensors = [network.embed_tokens, *(weight for weights in network.blocks for weight in weights), network.norm]
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


def batch(size: Size, tokens: int, device: torch.device, document: int | None = None) -> tuple[Tensor, Tensor, Packing]:
    """Random ids, labels, and rows of documents of `document` tokens (one per row without it)."""
    generator = torch.Generator().manual_seed(1)
    rows = tokens // size.length
    ids = torch.randint(4, size.config.vocab_size, (2, tokens), generator=generator).to(device)
    positions = torch.arange(size.length) % (document or size.length)
    return ids[0], ids[1], packing(positions.expand(rows, -1).contiguous(), device)


class Engine:
    """The new engine over a network: one micro-batch forward and backward."""

    def __init__(self, size: Size, network: Network, attention: str, compiled: bool, experts: str = "grouped_mm") -> None:
        self.size, self.network, self.compiled = size, network, compiled
        self.settings = settings_of(size.config, attention, experts)
        self.windows = windows_of(size.config)
        self.shares = torch.full((size.config.num_hidden_layers, size.config.num_local_experts), 1 / size.config.num_local_experts)
        self.shares = self.shares.to(network.norm.device)

    def loss(self, ids: Tensor, labels: Tensor, packed: Packing, recompute: list[str]) -> Tensor:
        """Cross-entropy, balance loss with lagged loads, and z-loss."""
        dtype = self.network.embed_tokens.dtype
        hidden, of_layers = forward(self.network, ids, packed, self.windows, self.settings, dtype, recompute, self.compiled)
        logits = torch.stack(of_layers)
        logprobs = label_logprobs(hidden, self.network.embed_tokens, labels, uniform=True)
        balance = self.size.config.num_local_experts * (self.shares * logits.softmax(-1).mean(1)).sum(-1).mean()
        return -logprobs.sum() / len(labels) + 0.02 * balance + 0.001 * logits.logsumexp(-1).square().mean()

    def step(self, data: tuple[Tensor, Tensor, Packing], recompute: list[str]) -> Callable[[], Tensor]:
        """A function that adds one micro-batch's gradients."""

        def run() -> Tensor:
            loss = self.loss(*data, recompute)
            loss.backward()
            return loss.detach()

        return run

    def modes(self, mode: str) -> list[str]:
        """One mode for all layers."""
        return [mode] * self.size.config.num_hidden_layers


def clear(network: Network) -> None:
    """Drop all gradients."""
    for parameter in parameters(network):
        parameter.grad = None


def distance(ours: Tensor, reference: Tensor) -> float:
    """Relative distance, in float64."""
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-30))
