"""Part `whole`: all layers, the optimizer's step that fits the card, and a profile by kind of kernel."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_parts.bench import BF16, GIB, Bench, rates
from benchmarks.gpu_parts.networks import Engine, batch, clear, parameters, random_network
from keural.train.network.attention import choose_attention
from keural.train.optimization.split import SplitAdamW


def whole(bench: Bench) -> None:
    """All layers, micro-batches first, then the optimizer's step."""
    size, tokens = bench.size, bench.size.tokens
    layers = size.config.num_hidden_layers
    chosen = choose_attention(bench.device, BF16)
    total = torch.cuda.get_device_properties(0).total_memory / GIB if bench.cuda else 0.0
    host = total < 120
    network = random_network(size.config, bench.device)
    number = sum(parameter.numel() for parameter in parameters(network))
    bench.record("model", parameters=number, mode="split-host" if host else "split", attention=chosen, loaded_gib=bench.peak())
    engine = Engine(size, network, chosen, True)
    best: tuple[float, int, list[str]] | None = None

    def measure(name: str, count: int, recompute: list[str], repeats: int = 3) -> float:
        step = engine.step(batch(size, count, bench.device), recompute)
        begun = time.monotonic()
        loss = float(step())
        first = time.monotonic() - begun
        step()
        bench.free()
        ms = bench.ms(step, repeats, 0)
        free = round(torch.cuda.mem_get_info()[0] / GIB, 2) if bench.cuda else None
        bench.record(
            name, **rates(size, ms, count), peak_gib=bench.peak(), first_s=round(first, 1), free_gib=free, loss=round(loss, 4)
        )
        nonlocal best
        if best is None or ms / count < best[0]:
            best = (ms / count, count, recompute)
        return ms

    with bench.guarded(f"full_{tokens}"):
        measure(f"full_{tokens}", tokens, ["full"] * layers)
    peak = json.loads(bench.out.read_text())["whole"].get(f"full_{tokens}", {}).get("peak_gib")
    per_layer = 1.13 * tokens / 16_384  # GiB that a selective layer keeps beyond its input
    room = total - (0.0 if host else number * 4.03 / GIB) - 4.5 - (peak or 0.0)
    keep = max(0, min(layers, int(room / per_layer))) if peak else layers // 2
    for kept in dict.fromkeys((keep, max(keep - 2, 0))):
        if kept:
            name = f"selective_{kept}_of_{layers}_{tokens}"
            with bench.guarded(name, 15):
                measure(name, tokens, ["selective"] * kept + ["full"] * (layers - kept))
                break
    half = tokens // 2
    keep = max(0, min(layers, int((room + 3) / (per_layer / 2)))) if peak else layers
    if keep:
        with bench.guarded(f"selective_{keep}_of_{layers}_{half}", 15):
            measure(f"selective_{keep}_of_{layers}_{half}", half, ["selective"] * keep + ["full"] * (layers - keep))
    if best is not None:
        with bench.guarded("profile", 15):
            profile(bench, engine.step(batch(size, best[1], bench.device), best[2]))
        with bench.guarded("optimizer", 40):
            whole_step(bench, engine, best, host)


def whole_step(bench: Bench, engine: Engine, best: tuple[float, int, list[str]], host: bool) -> None:
    """Optimizer steps after two micro-batches each, and tokens per second of a step of 262,144 tokens."""
    per_token, count, recompute = best
    if host and bench.cuda:
        available = int(
            next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")).split()[1]
        )
        needed = sum(parameter.numel() for parameter in parameters(engine.network)) * 4.03 / GIB * 1.12
        if available / 2**20 < needed + 4:
            raise MemoryError(f"{available / 2**20:.0f} GiB of host memory are free, {needed + 4:.0f} are needed")
    begun = time.monotonic()
    optimizer = SplitAdamW(parameters(engine.network), host=host)
    bench.record("optimizer", state_made_s=round(time.monotonic() - begun, 1), chunks=len(optimizer.chunks))
    step = engine.step(batch(engine.size, count, bench.device), recompute)
    times = []
    for _ in range(3):
        clear(engine.network)
        losses = [step(), step()]
        times.append(bench.ms(lambda: optimizer.step(1e-5, 1.0), 1, 0))
        bench.record(
            "optimizer",
            step_ms=[round(t, 1) for t in times],
            losses=[round(float(loss), 4) for loss in losses],
            peak_gib=bench.peak(),
        )
    batch_tokens = 262_144 if not bench.small else 4 * count
    ms = per_token * batch_tokens + min(times)
    bench.record("optimizer", step_of_262144=rates(engine.size, ms, batch_tokens), share=round(min(times) / ms, 4))


KINDS = {
    "attention": ("flash", "fmha", "attn", "flex"),
    "experts": ("grouped", "cutlass", "group_gemm"),
    "softmax": ("_logprobs_with_gradient",),
    "optimizer": ("_split_adamw",),
    "matmul": ("gemm", "nvjet", "cublas", "splitk", "xmma", "wgmma"),
    "fused": ("triton",),
    "sort": ("sort", "radix", "scan"),
    "embedding": ("embedding",),
    "copies": ("copy", "memcpy", "memset", "fill", "cat"),
}


def profile(bench: Bench, step: Callable[[], Tensor]) -> None:
    """Device time of one micro-batch by kind of kernel, and the longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if bench.cuda else [ProfilerActivity.CPU]
    with record(activities=kinds) as profiler:
        begun = time.monotonic()
        step()
        if bench.cuda:
            torch.cuda.synchronize()
        wall = (time.monotonic() - begun) * 1e3
    totals: dict[str, float] = {}
    kernels: list[tuple[float, int, str]] = []
    for event in profiler.key_averages():
        if bench.cuda and str(event.device_type) != "DeviceType.CUDA":
            continue
        spent = float(event.self_device_time_total if bench.cuda else event.self_cpu_time_total) / 1e3
        kind = next((kind for kind, marks in KINDS.items() if any(mark in event.key.lower() for mark in marks)), "other")
        totals[kind] = totals.get(kind, 0.0) + spent
        kernels.append((round(spent, 2), event.count, event.key[:90]))
    kernels.sort(reverse=True)
    by_kind = {kind: round(ms, 1) for kind, ms in sorted(totals.items(), key=lambda item: -item[1])}
    device = round(sum(totals.values()), 1)
    bench.record("profile", wall_ms=round(wall, 1), device_ms=device, by_kind=by_kind, longest=kernels[:25])
