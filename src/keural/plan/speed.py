"""How fast a stage runs: at an MFU that somebody states, that was measured, or that is taken from the tables of `benchmarks/`.

In: a card, a way of computing, perhaps a file of `benchmarks/gpu.py`. Out: a `Rate` that says where it comes from. MFU is the share
of the card's dense products per second, counted with attention over what a token sees, without recomputation.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keural.errors import UserError
from keural.files import read_object
from keural.plan.gpus import Gpu
from keural.train.memory.activations import Way
from keural.train.memory.network import Network

PEAK = 989.5e12
"""What `benchmarks/gpu.py` counts MFU against on every card."""
KNOWN = {
    ("h200", "selective", True): 0.503,
    ("h200", "full", True): 0.407,
    ("h200", "none", True): 0.474,
    ("h200", "none", False): 0.357,
    ("h200", "full", False): 0.263,
    ("h100", "selective", True): 0.485,
    ("h100", "full", True): 0.404,
    ("h100", "none", True): 0.471,
    ("h100", "none", False): 0.334,
    ("h100", "full", False): 0.247,
}
"""Forward and backward pass of the training engine by card, recompute and compilation (`benchmarks/gpu_*_2026-11-26.md`)."""
LAYERS = 0.182
"""Of the model's own layers: one H200 (same place)."""
UNMEASURED = 0.25
"""Of anything else: an assumption."""
OPTIMIZER = {"split": 0.22, "split-host": 1.44}
"""Seconds of an optimizer step of 14.83B parameters (same place)."""
MEASURED_PARAMETERS = 14_832_054_272


@dataclass(frozen=True)
class Rate:
    """An MFU; with `whole` it is that of everything a step does, else of one forward and backward pass, to which the optimizer and
    further forward passes are added.
    """

    mfu: float
    optimizer_seconds: float
    whole: bool
    source: str


def known_rate(network: Network, gpu: Gpu, shards: int, way: Way, precision: str) -> Rate:
    """From the tables of `benchmarks/`, or an assumption; `shards` cards share a copy of the weights, and the optimizer's step."""
    scale = network.counts.total / MEASURED_PARAMETERS
    seconds = OPTIMIZER.get(precision, 0.22) * scale / shards
    if way.engine and way.itemsize == 2 and gpu.name in ("h100", "h200"):
        layers = network.model.num_hidden_layers
        mfu = _mean([KNOWN.get((gpu.name, mode, way.compiled), KNOWN[gpu.name, "full", False]) for mode in way.modes(layers)])
        return Rate(mfu, seconds, False, f"measured on one {gpu.name}, 24 layers of the published widths")
    if gpu.name in ("h100", "h200") and way.itemsize == 2:
        return Rate(LAYERS, seconds, False, "the model's own layers, measured on one h200")
    return Rate(UNMEASURED, seconds, False, "assumed: nothing was measured on it")


def measured_rate(path: Path, network: Network, gpu: Gpu, shards: int, way: Way) -> Rate:
    """From a file of `benchmarks/gpu.py`: all layers where they were measured, else four, with the nearest micro-batch.

    Raises `UserError` when the file has no such figure, or is another card's.
    """
    found = read_object(path)
    name = str(_at(found, "check", "device").get("name", ""))
    if name and gpu.name not in name.lower():
        raise UserError(f"{path}: was measured on {name}, not on {gpu.name}; give --gpu as it is there, or another file")
    if way.mix is not None:
        return _measured_mix(path, network, gpu, shards, way)
    if not way.engine:
        entry = _at(found, "baselines", "present_bf16_weights", "extrapolated_24")
        rates = [(0, way.tokens, _figure(entry), "the model's own layers without sharding")] if entry else []
    else:
        rates = [rate[1:] for rate in _rates(found) if rate[0] == (way.recompute, way.compiled)]
    rates = [rate for rate in rates if rate[2] > 0]
    if not rates:
        what = f"recompute {way.recompute}{'' if way.compiled else ', not compiled'}" if way.engine else "the model's own layers"
        raise UserError(f"{path}: has no MFU of {what} on an accelerator; run benchmarks/gpu.py there, or give --mfu")
    _, _, mfu, kind = min(rates, key=lambda rate: (rate[0], abs(rate[1] - way.tokens)))
    steps = _at(found, "whole", "optimizer").get("step_ms") or [0.0]
    numbers = [step for step in steps if isinstance(step, int | float) and 0 <= step < 1e9] if isinstance(steps, list) else []
    seconds = min(numbers, default=0.0) / 1e3 * network.counts.total / MEASURED_PARAMETERS / shards
    return Rate(mfu * PEAK / gpu.bfloat16_flops, seconds, False, f"{path}: {kind}")


def _measured_mix(path: Path, network: Network, gpu: Gpu, shards: int, way: Way) -> Rate:
    """Of layers that keep different things: each is as fast as it was measured among its like."""
    modes = way.modes(network.model.num_hidden_layers)
    alike = {
        mode: measured_rate(path, network, gpu, shards, replace(way, recompute=mode, mix=None)) for mode in dict.fromkeys(modes)
    }
    source = "; ".join(dict.fromkeys(rate.source for rate in alike.values()))
    return replace(alike[modes[0]], mfu=_mean([alike[mode].mfu for mode in modes]), source=source)


def _mean(rates: Sequence[float]) -> float:
    """Of layers one after another that run at these rates."""
    return len(rates) / sum(1 / rate for rate in rates)


def _rates(found: dict[str, Any]) -> Iterator[tuple[tuple[str, bool], int, int, float, str]]:
    """(recompute, compiled), 0 for all layers and 1 for four, tokens, MFU, what it is."""
    for name, entry in _at(found, "whole").items():
        match = re.fullmatch(r"(?:full|selective_(\d+)_of_(\d+))_(\d+)", name)
        if match and match[1] == match[2]:
            mode, tokens = "selective" if match[1] else "full", int(match[3])
            yield (mode, True), 0, tokens, _figure(entry), f"all layers, {tokens:,} tokens"
    for name, entry in _at(found, "stack").items():
        match = re.fullmatch(r"(none|selective|full)_(compiled|eager)_(\d+)", name)
        if match and isinstance(entry, dict):
            extrapolated = _figure(entry.get("extrapolated_24"))
            yield (match[1], match[2] == "compiled"), 1, int(match[3]), extrapolated, f"four layers, {int(match[3]):,} tokens"


def _figure(entry: Any) -> float:
    value = entry.get("mfu_causal", 0) if isinstance(entry, dict) else 0
    return float(value) / 100 if isinstance(value, int | float) and 0 < value < 100 else 0.0


def _at(found: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
