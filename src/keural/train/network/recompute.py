"""What a layer keeps for its backward pass, and what it computes again.

`none` keeps everything that autograd asks for. `selective` keeps the layer's input and the results that cost most to compute:
matrix products, attention, and the router's choice, which so cannot come out differently; norms, rotation, activation and
permutations run again. `full` keeps the input only and runs the whole layer again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import keural.train.network.attention  # noqa: F401 (registers the operation of varlen attention)

RECOMPUTE = ("none", "selective", "full")

_ATEN = torch.ops.aten
KEPT = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN._grouped_mm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.higher_order.flex_attention,
    _ATEN.topk.default,
    _ATEN.sort.stable,
}
"""Operations whose results `selective` keeps."""


def _policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(layer: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """`layer` under a mode of `RECOMPUTE`."""
    if mode == "none":
        return layer
    if mode == "full":
        return partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
    assert mode == "selective", mode
    return partial(
        checkpoint,
        layer,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
    )
