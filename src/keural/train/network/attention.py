"""Attention over packed documents, behind one small registry: a plain twin and the kernels that skip what a query must not see.

In: queries, keys and values of flattened rows, and where their documents begin (`Packing`). Out: the attention output. Every
backend gives the same numbers as `masked`, the twin; `choose_attention` finds the fastest one that does on this machine.

Letters: N = rows * T tokens, D head width.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from keural.train.network.document_attention import DocumentStacks, attend_to_documents, stack_documents

GROUPED_KEYWORD = {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}
"""torch 2.12 and later want grouped-query attention to be asked for; torch 2.11 takes it as it comes."""


class Packing(NamedTuple):
    """Where the documents of `rows` rows of `length` tokens lie, on the device.

    `offsets` ``[documents + 1]`` int32: where each document begins among the N tokens, and N at the end; a row always begins one.
    `documents` ``[N]`` int32: the document of each token. `positions` ``[N]``: its place in the document.
    """

    offsets: Tensor
    documents: Tensor
    positions: Tensor
    rows: int
    length: int


def packing(position_ids: Tensor, device: torch.device) -> Packing:
    """The documents of rows ``[rows, T]`` of positions on the CPU: one begins where a position does not follow its left neighbour.

    Nothing is read back from the device.
    """
    rows, length = position_ids.shape
    begins = torch.ones(rows, length, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    begins = begins.flatten()
    starts = begins.nonzero().squeeze(-1)
    offsets = torch.cat([starts, torch.tensor([rows * length])]).to(torch.int32)
    documents = begins.cumsum(0).sub(1).to(torch.int32)
    offsets, documents, positions = (to_device(tensor, device) for tensor in (offsets, documents, position_ids.flatten()))
    packed = Packing(offsets, documents, positions, rows, length)
    torch._dynamo.maybe_mark_dynamic(packed.offsets, 0)  # the number of documents changes with every micro-batch
    return packed


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class AttentionBackend(NamedTuple):
    """`prepare(packing, window)` is called once per forward pass and kind of layer, `attend(query, key, value, prepared)` once per
    layer.

    Queries are ``[N, heads, D]``, keys and values ``[N, kv heads, D]``; the output is ``[N, heads, D]``. `window` counts the keys
    that a query sees, itself included; None is all of its document so far.
    """

    prepare: Callable[[Packing, int | None], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]


def may_see(packing: Packing, query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether token `query` sees token `key` (indices among the N): not after it, in its document, in its window."""
    seen = (packing.documents[query] == packing.documents[key]) & (query >= key)
    return seen if window is None else seen & (query - key < window)


def _mask(packing: Packing, window: int | None) -> Tensor:
    """``[rows, 1, T, T]`` bool."""
    token = torch.arange(packing.rows * packing.length, device=packing.documents.device).view(packing.rows, packing.length)
    return may_see(packing, token[:, :, None], token[:, None, :], window)[:, None]


def _attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    rows, _, length, _ = mask.shape
    groups = query.shape[1] // key.shape[1]
    query, key, value = (
        heads.unflatten(0, (rows, length)).transpose(1, 2) for heads in (query, spread(key, groups), spread(value, groups))
    )
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(0, 1)


def spread(heads: Tensor, groups: int) -> Tensor:
    """Key or value heads ``[N, kv heads, D]``, each as often as query heads read it."""
    return heads.unsqueeze(2).expand(-1, -1, groups, -1).flatten(1, 2)


def _prepare_varlen(packing: Packing, window: int | None) -> tuple[Tensor, int, int]:
    return packing.offsets, packing.length, -1 if window is None else window - 1


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, prepared: tuple[Tensor, int, int]) -> Tensor:
    offsets, longest, left = prepared
    attend: Any = varlen_attn
    output: Tensor = attend(query, key, value, offsets, offsets, longest, longest, window_size=(left, 0), **GROUPED_KEYWORD)
    return output


def _attend_varlen_spread(query: Tensor, key: Tensor, value: Tensor, prepared: tuple[Tensor, int, int]) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    return _attend_varlen(query, spread(key, groups), spread(value, groups), prepared)


def _prepare_flex(packing: Packing, window: int | None) -> Any:
    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_see(packing, query, key, window)

    tokens = packing.rows * packing.length
    return create_block_mask(mask_mod, None, None, tokens, tokens, device=packing.documents.device)


def _attend_flex(query: Tensor, key: Tensor, value: Tensor, prepared: Any) -> Tensor:
    attend: Any = _compiled_flex() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    query, key, value = (heads.transpose(0, 1).unsqueeze(0) for heads in (query, key, value))
    output: Tensor = attend(query, key, value, block_mask=prepared, enable_gqa=True)
    return output.squeeze(0).transpose(0, 1).contiguous()


def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention as a kernel: uncompiled it would write out all scores."""
    global _flex
    if _flex is None:
        _flex = torch.compile(flex_attention)
    return _flex


_flex: Callable[..., Any] | None = None


def _prepare_documents(packing: Packing, window: int | None) -> DocumentStacks:
    return stack_documents(packing.offsets.numpy().astype("int64"), window)


ATTENTION: dict[str, AttentionBackend] = {
    "varlen": AttentionBackend(_prepare_varlen, _attend_varlen),
    "varlen-spread": AttentionBackend(_prepare_varlen, _attend_varlen_spread),
    "flex": AttentionBackend(_prepare_flex, _attend_flex),
    "documents": AttentionBackend(_prepare_documents, attend_to_documents),
    "masked": AttentionBackend(_mask, _attend_masked),
}
"""In the order of preference on an accelerator. `varlen-spread` repeats keys and values for every query head first; `documents` is
for CPUs, and cannot be compiled.
"""

PROBE_TOLERANCE = 2e-2
"""Relative distance that bfloat16 allows between two ways to the same attention."""


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int = 128, compiled: bool = False) -> str:
    """The first backend that runs on `device` and agrees with the twin, forward and backward, on 512 tokens of several documents.

    On a CPU it is `documents`; in compiled layers there, and in a dtype for which there is no kernel, it is the twin. Where no
    kernel works on an accelerator, a warning says what that costs.
    """
    if device.type == "cpu" and not compiled:
        return "documents"
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "masked"
    reasons = []
    for name in ATTENTION:
        if name == "documents":
            break
        try:
            distance = attention_distance(name, device, dtype, head_dim)
        except Exception as error:  # whatever a kernel's library raises: the next backend is tried, and the reason is told
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        if distance < PROBE_TOLERANCE:
            return name
        reasons.append(f"{name}: off by {distance:.1e}")
    warnings.warn(
        "no attention kernel for packed documents works here, so every layer computes and masks whole rows: about six times the "
        f"work at 4,096 tokens with a window of 513 ({'; '.join(reasons)})",
        stacklevel=2,
    )
    return "masked"


def attention_distance(name: str, device: torch.device, dtype: torch.dtype, head_dim: int = 128) -> float:
    """Largest relative distance of a backend's output and gradients from the twin's, with and without a window."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(length) for length in (100, 156, 200, 56)]).view(2, 256)
    packed = packing(positions, device)
    shapes = [(512, heads, head_dim) for heads in (4, 2, 2, 4)]
    *inputs, upstream = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    worst = 0.0
    for window in (None, 65):
        results = []
        for backend in (ATTENTION[name], ATTENTION["masked"]):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            query, key, value = leaves
            output = backend.attend(query, key, value, backend.prepare(packed, window))
            results.append([output.detach(), *torch.autograd.grad(output, leaves, upstream)])
        for ours, twin in zip(*results, strict=True):
            worst = max(worst, float((ours.float() - twin.float()).norm() / twin.float().norm()))
    return worst
