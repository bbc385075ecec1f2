"""Part `baselines`: the four layers of `stack` by the model class itself: the trainer's step over it, and a published-style one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_parts.bench import BF16, Bench, Size, rates
from benchmarks.gpu_parts.networks import batch
from benchmarks.gpu_parts.stack import extrapolate
from keural.model import KeuralMoECausalLM
from keural.train.micro_batches import MicroBatch, PairIndices
from keural.train.network.policy import Policy


def hf_model(size: Size, dtype: torch.dtype, device: torch.device, experts: str) -> KeuralMoECausalLM:
    """The model class itself, made on the device."""
    size.config._experts_implementation = experts
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = KeuralMoECausalLM(size.config)
    finally:
        torch.set_default_dtype(before)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def baselines(bench: Bench) -> None:
    """Four layers by the trainer's present step, and by a published-style one, on the same data."""
    count = bench.size.tokens
    rows = count // bench.size.length
    ids, labels, _ = batch(bench.size, count, bench.device)
    positions = torch.arange(bench.size.length, device=bench.device).expand(rows, -1)

    def published(model: Any) -> Callable[[], Any]:
        return lambda: model(
            input_ids=ids.view(rows, -1), labels=labels.view(rows, -1), use_cache=False, output_router_logits=True
        ).loss.backward()

    def today(model: Any) -> Callable[[], Any]:
        policy, mask = Policy(model, BF16), torch.ones_like(positions, dtype=torch.bool)
        none = PairIndices(np.zeros((2, 0), int), *(torch.zeros(0, dtype=torch.long, device=bench.device) for _ in range(2)))
        micro = MicroBatch(ids.view(rows, -1), positions, labels.view(rows, -1), mask, positions.cpu().numpy(), none)

        def step() -> None:
            output = policy(micro)
            (
                -output.logprobs.sum() / count + 0.001 * torch.stack(output.router_logits).float().logsumexp(-1).square().mean()
            ).backward()

        return step

    cases: list[tuple[str, torch.dtype, str, Callable[[Any], Callable[[], Any]], bool]] = [
        ("published_style", BF16, "eager", published, False),
        ("present_one_process", torch.float32, "grouped_mm", today, True),
        ("present_bf16_weights", BF16, "grouped_mm", today, True),  # what FSDP2 gathers on several
    ]
    for name, dtype, experts, make, deterministic in cases:
        with bench.guarded(name, 15):
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            found = {}
            for layers in (4, 2):
                bench.free()
                model = hf_model(bench.size.layers(layers), dtype, bench.device, experts)
                found[layers] = bench.ms(make(model), 2)
                bench.record(
                    name,
                    **{f"layers_{layers}": rates(bench.size.layers(layers), found[layers], count) | {"peak_gib": bench.peak()}},
                )
                del model
            extrapolate(bench, name, found, count)
        torch.use_deterministic_algorithms(False)
