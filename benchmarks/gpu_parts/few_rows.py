"""Of part `serve`: the kernel for few rows by each kind of block, beside the library's products.

In: a model on a GPU. Out: milliseconds of all layers' products; the best kind of block is what the rest of the part goes by.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.gpu_parts.bench import BF16, Bench
from keural.model import KeuralMoECausalLM
from keural.serve.batching import kernels
from keural.serve.batching.fixed_step import layer_weights
from keural.serve.batching.kernels import ALL, CHOSEN, SORTED, few_rows

TRIED = ((32, 128, 4, 4), (64, 128, 4, 4), (64, 256, 3, 8), (64, 128, 6, 4), (128, 128, 4, 8), (64, 64, 8, 4))
"""Blocks of the kernel that multiplies few rows: outputs, inputs, stages, warps."""


def products(bench: Bench, model: KeuralMoECausalLM) -> None:
    """Milliseconds of all layers' products of one row by each kind of block, and by the library's; the best goes on."""
    layers, head = layer_weights(model), model.lm_head.weight[None]
    hidden = torch.randn(1, head.shape[-1], device=bench.device, dtype=BF16)
    inner = torch.randn(16, layers[0].down.shape[-1], device=bench.device, dtype=BF16)
    chosen = torch.tensor([1, 5], device=bench.device)
    spread = torch.arange(2, 17, 2, device=bench.device, dtype=torch.int32)
    sixteen = hidden.repeat(16, 1)
    kinds: dict[str, Callable[[tuple[int, int, int, int]], object]] = {
        "gate_up": lambda b: [few_rows(hidden, each.gate_up, CHOSEN, chosen, 2, b) for each in layers],
        "down": lambda b: [few_rows(inner[:2], each.down, CHOSEN, chosen, 1, b) for each in layers],
        "query_key_value": lambda b: [few_rows(hidden, each.query_key_value[None], ALL, None, 1, b) for each in layers],
        "output": lambda b: [few_rows(hidden, each.output[None], ALL, None, 1, b) for each in layers],
        "head": lambda b: few_rows(hidden, head, ALL, None, 1, b),
        "gate_up of 8 rows": lambda b: [few_rows(sixteen, each.gate_up, SORTED, spread, 1, b) for each in layers],
        "down of 8 rows": lambda b: [few_rows(inner, each.down, SORTED, spread, 1, b) for each in layers],
    }
    found = {}
    for blocks in TRIED:
        taken = {name: round(bench.ms(lambda: kind(blocks), 3, 2), 3) for name, kind in kinds.items()}  # noqa: B023
        found[blocks] = sum(taken[name] for name in list(kinds)[:5])
        bench.record(f"products {' '.join(map(str, blocks))}", **taken, one_row=round(found[blocks], 3))
    for rows in (1, 8):
        states = sixteen[:rows]
        bench.record(
            f"products by the library {rows}",
            query_key_value=round(bench.ms(lambda: [F.linear(states, each.query_key_value) for each in layers], 3, 2), 3),  # noqa: B023
            output=round(bench.ms(lambda: [F.linear(states, each.output) for each in layers], 3, 2), 3),  # noqa: B023
            head=round(bench.ms(lambda: F.linear(states, head[0]), 3, 2), 3),  # noqa: B023
        )
    kernels.BLOCKS = min(found, key=found.__getitem__)
