"""The training engine on one accelerator, proven and timed by one command within eight minutes.

    python benchmarks/gpu.py [--small] [--seconds 470] [--parts check,stack,whole,...] [--out gpu.json]

Parts run in the order of `PARTS`, each in a process of its own that is stopped at its limit, so that neither a crash nor a hang
costs more than that part. Every figure is printed and written to the JSON as soon as it is known; what fails is written down with
its reason. Needs torch with CUDA, triton and transformers, and keural's sources on PYTHONPATH; no network.

- `check`: roof and copy bandwidth; every CUDA path against its CPU twin, bfloat16 against float64, nothing that waits, same bits
  twice.
- `stack`: four layers and the head at the real shapes, by what is kept for the backward pass; 24 layers by difference of 4 and 2.
- `whole`: all 24 layers with the optimizer that fits the card, and a profile by part.
- `baselines`: the same four layers by the trainer's present step and by a published-style one.
- `parts`: attention by backend, head by piece, experts, optimizer.
- `toy`: `keural run recipes/toy --until sft-1`, and its first stage in each precision.
- `serve`: tokens per second of the server's slots at 1, 8 and 32 streams, beside transformers' continuous batching, both greedy.

FLOPs are those of the model, recomputation not counted: 3 x forward. `causal` counts the keys a query sees, `square` all T of them
in every layer (as Megatron prints). MFU is against 989.5 TFLOP/s.
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # whether there is CUDA is asked without starting it, before the forks
os.environ.setdefault(
    "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.train.losses import token_logprobs
from keural.train.micro_batches import MicroBatch, PairIndices
from keural.train.network import head as heads
from keural.train.network.attention import ATTENTION, Packing, attention_distance, choose_attention, packing
from keural.train.network.block import BlockWeights, Network, settings_of, windows_of
from keural.train.network.experts import mixture
from keural.train.network.head import label_logprobs
from keural.train.network.layers import COMPILED, forward, graphs
from keural.train.network.policy import Policy
from keural.train.optimization.muon import orthogonalized
from keural.train.optimization.split import SplitAdamW

PEAK = 989.5e12
GIB = 2**30
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """A model and a micro-batch."""

    config: KeuralConfig
    length: int
    tokens: int

    def layers(self, number: int) -> "Size":
        """The same with so many layers."""
        values = self.config.to_dict() | {"num_hidden_layers": number, "layer_types": self.config.layer_types[:number]}
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok",
                 "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings",
                 "layer_types")  # fmt: skip
        return replace(self, config=KeuralConfig(**{name: values[name] for name in names}))


REAL = Size(
    KeuralConfig(
        vocab_size=131_074, hidden_size=4096, intermediate_size=5632, num_hidden_layers=24, num_local_experts=8,
        num_experts_per_tok=2, num_attention_heads=32, num_key_value_heads=8, head_dim=128, sliding_window=513,
        max_position_embeddings=4096,
    ), 4096, 16_384,
)  # fmt: skip
SMALL = Size(
    KeuralConfig(
        vocab_size=514, hidden_size=128, intermediate_size=96, num_hidden_layers=6, num_local_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=33,
        max_position_embeddings=128,
    ), 128, 512,
)  # fmt: skip


class Bench:
    """Where results go, and what is measured."""

    def __init__(self, part: str, out: Path, size: Size, deadline: float, small: bool) -> None:
        self.part, self.out, self.size, self.deadline, self.small = part, out, size, deadline, small
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda = self.device.type == "cuda"
        if self.device.type == "cpu":
            torch.set_num_threads(1)
            COMPILED.update(graphs("aot_eager"))  # code generation for a CPU takes minutes

    def record(self, name: str, /, **values: Any) -> None:
        """Print a result and write it down."""
        print(f"{self.part} {name} {json.dumps(values)}", flush=True)
        known = json.loads(self.out.read_text()) if self.out.exists() else {}
        known.setdefault(self.part, {}).setdefault(name, {}).update(values)
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(known, indent=1))
        temporary.replace(self.out)

    @contextmanager
    def guarded(self, name: str, seconds: float = 0.0) -> Iterator[None]:
        """A piece whose failure is written down and stops nothing else; left out when less than `seconds` remain."""
        started = time.monotonic()
        try:
            if self.deadline - started < seconds and not self.small:
                raise TimeoutError(f"only {self.deadline - started:.0f} s were left, {seconds:.0f} are needed")
            yield
            self.record(name, took_s=round(time.monotonic() - started, 2))
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()][:3]
            where = "".join(traceback.format_exception(error)[-4:])[-800:]
            self.record(name, error=f"{type(error).__name__}: {' '.join(lines)[:400]}", where=where)
        finally:
            self.free()

    def free(self) -> None:
        """Give unused memory back and forget the peak."""
        import gc

        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        """GiB that were allocated at most since `free`."""
        return round(torch.cuda.max_memory_allocated() / GIB, 2) if self.cuda else None

    def ms(self, function: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> float:
        """Median milliseconds of a call."""
        for _ in range(warmup if self.cuda else 0):
            function()
        times = []
        for _ in range(repeats if self.cuda else 1):
            if self.cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                start.record()  # type: ignore[no-untyped-call]
                function()
                end.record()  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begun = time.perf_counter()
                function()
                times.append((time.perf_counter() - begun) * 1e3)
        return sorted(times)[len(times) // 2]


def flops_per_token(size: Size, square: bool = False) -> float:
    """Of forward and backward pass, recomputation left out."""
    c, length = size.config, size.length
    assert c.head_dim is not None
    width, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    experts = 2 * 3 * c.hidden_size * c.intermediate_size * c.num_experts_per_tok
    projections = 2 * c.hidden_size * (2 * width + 2 * kv)
    total = 2.0 * c.vocab_size * c.hidden_size
    for window in windows_of(c):
        seen = min(window or length, length)
        keys = length if square else (seen * (seen + 1) / 2 + (length - seen) * seen) / length
        total += experts + projections + 4 * width * keys
    return 3 * total


def rates(size: Size, ms: float, tokens: int) -> dict[str, float]:
    """Tokens per second and MFU by both conventions."""
    per_second = tokens / ms * 1e3
    mfu = {
        name: round(100 * per_second * flops_per_token(size, square) / PEAK, 2)
        for name, square in (("causal", False), ("square", True))
    }
    return {"ms": round(ms, 2), "tokens_per_s": round(per_second), "mfu_causal": mfu["causal"], "mfu_square": mfu["square"]}


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


# check ------------------------------------------------------------------------------------------------------------------


def check(bench: Bench) -> None:
    """Correctness, and what the card can do."""
    with bench.guarded("device"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        bench.record(
            "device", torch=torch.__version__, transformers=version("transformers"), cores=os.cpu_count(), host_gib=round(memory, 1)
        )
        if bench.cuda:
            p = torch.cuda.get_device_properties(0)
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
            versions = {"cuda": torch.version.cuda, "driver": driver, "triton": version("triton")}
            bench.record("device", name=p.name, gib=round(p.total_memory / GIB, 1), **versions)
    with bench.guarded("roof"):
        check_roof(bench)
    check_attention(bench)
    check_engine(bench)
    check_head(bench)
    check_split(bench)
    check_muon(bench)
    check_discipline(bench)


def check_roof(bench: Bench) -> None:
    """The largest rates of a matrix product and of a copy."""
    n = 256 if bench.small else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=BF16) for _ in range(2))
    ms = bench.ms(lambda: a @ b)
    big = torch.randn(2**18 if bench.small else 2**30, device=bench.device, dtype=BF16)
    copy = bench.ms(big.clone, 3)
    bench.record("roof", matmul_tflops=round(2 * n**3 / ms / 1e9, 1), copy_gb_per_s=round(2 * big.nbytes / copy / 1e6, 1))


def check_attention(bench: Bench) -> None:
    """Every backend against the twin; which one is chosen."""
    for name in (
        ("varlen", "varlen-spread", "masked") if bench.cuda else ("masked",)
    ):  # FlexAttention takes long to compile: in `parts`
        with bench.guarded(f"attention_{name}"):
            bench.record(f"attention_{name}", distance_bf16=attention_distance(name, bench.device, BF16))
    with bench.guarded("attention_chosen"):
        bench.record("attention_chosen", name=choose_attention(bench.device, BF16))


def middle(bench: Bench) -> Size:
    """A model that float64 on a CPU can check in seconds, with the real head width."""
    if bench.small:
        return bench.size.layers(2)
    config = KeuralConfig(
        vocab_size=1026, hidden_size=512, intermediate_size=704, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, sliding_window=65, max_position_embeddings=256,
    )  # fmt: skip
    return Size(config, 256, 512)


def gradients(engine: Engine, data: tuple[Tensor, Tensor, Packing], mode: str) -> list[Tensor]:
    """Loss and gradients of one micro-batch."""
    clear(engine.network)
    loss = engine.step(data, engine.modes(mode))()
    return [loss, *(parameter.grad for parameter in parameters(engine.network) if parameter.grad is not None)]


def like(network: Network, device: torch.device, dtype: torch.dtype) -> Network:
    """A copy with matrices in `dtype`; gains and routers stay as wide as they are, at least."""

    def move(tensor: Tensor) -> nn.Parameter:
        wide = tensor.dtype == torch.float32 and dtype != torch.float64
        return nn.Parameter(tensor.detach().to(device, tensor.dtype if wide else dtype))

    layers = tuple(BlockWeights(*(move(weight) for weight in weights)) for weights in network.blocks)
    return Network(move(network.embed_tokens), layers, move(network.norm), network.inv_freq.to(device))


def worst(ours: list[Tensor], reference: list[Tensor]) -> float:
    """The largest relative distance."""
    return max(distance(a, b) for a, b in zip(ours, reference, strict=True))


def check_engine(bench: Bench) -> None:
    """Loss and all gradients of a small network: float32 on the device against the CPU, bfloat16 against float64."""
    size, cpu = middle(bench), torch.device("cpu")
    base = random_network(size.config, cpu, BF16, 0.05)
    data = {device: batch(size, size.tokens, device, 100) for device in (cpu, bench.device)}
    exact = like(base, cpu, torch.float64)
    exact = exact._replace(blocks=tuple(BlockWeights(*(nn.Parameter(w.detach().double()) for w in b)) for b in exact.blocks))
    reference = gradients(Engine(size, exact, "masked", False, "loop"), data[cpu], "none")
    with bench.guarded("engine_float32"):
        networks = {device: like(base, device, torch.float32) for device in (cpu, bench.device)}
        twin = gradients(Engine(size, networks[cpu], "masked", False, "loop"), data[cpu], "none")
        ours = gradients(Engine(size, networks[bench.device], "masked", False, "loop"), data[bench.device], "none")
        bench.record("engine_float32", device_to_cpu=worst(ours, twin), to_float64=worst(ours, reference))
    network = like(base, bench.device, BF16)
    chosen = choose_attention(bench.device, BF16)
    plain = 0.0
    with bench.guarded("engine_bfloat16_plain"):
        plain = worst(gradients(Engine(size, network, "masked", False, "loop"), data[bench.device], "none"), reference)
        bench.record("engine_bfloat16_plain", to_float64=plain)
    first: list[Tensor] = []
    for compiled in (False, True):
        for mode in ("selective",) if compiled or bench.small else ("none", "selective", "full"):  # `stack` compiles the others
            name = f"engine_bfloat16_{mode}{'_compiled' if compiled else ''}"
            with bench.guarded(name):
                engine = Engine(size, network, chosen, compiled)
                ours = [tensor.clone() for tensor in gradients(engine, data[bench.device], mode)]
                again = gradients(engine, data[bench.device], mode)
                same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
                to_exact, first = worst(ours, reference), first or ours
                ratio = to_exact / plain if plain else None
                distances = {"to_float64": to_exact, "ratio_to_plain": ratio, "to_first": worst(ours, first)}
                bench.record(name, **distances, same_bits_twice=same)
    with bench.guarded("expert_without_tokens"):
        tokens = torch.randn(64, 128, device=bench.device, dtype=BF16)
        weights = torch.full((64, 2), 0.5, device=bench.device)
        chosen_experts = torch.tensor([[0, 2]], device=bench.device).expand(64, 2)
        gate_up = torch.randn(4, 128, 128, device=bench.device, dtype=BF16, requires_grad=True)
        down = torch.randn(4, 128, 64, device=bench.device, dtype=BF16, requires_grad=True)
        junk = torch.full((4, 128, 128), math.nan, device=bench.device, dtype=BF16)
        del junk  # what is not written would show it
        mixture(tokens, weights, chosen_experts, gate_up, down).sum().backward()
        assert gate_up.grad is not None
        assert down.grad is not None
        idle = float(gate_up.grad[[1, 3]].abs().sum() + down.grad[[1, 3]].abs().sum())
        bench.record("expert_without_tokens", gradient=idle, others_finite=bool(gate_up.grad.isfinite().all()))
    with bench.guarded("experts_of_any_rows", 20):
        bench.record("experts_of_any_rows", **any_rows(bench))


def any_rows(bench: Bench) -> dict[str, float]:
    """The graph of experts that are divided among processes, which takes as many rows as come, against one product per expert."""
    gate_up, down = (torch.randn(shape, device=bench.device, dtype=BF16) * 0.1 for shape in ((4, 128, 128), (4, 128, 64)))
    found = {}
    for rows in (64, 200, 3):
        tokens, weights = torch.randn(rows, 128, device=bench.device, dtype=BF16), torch.rand(rows, 1, device=bench.device)
        chosen = torch.randint(0, 4, (rows, 1), device=bench.device)
        results = []
        for mix, backend in ((COMPILED["experts"], "grouped_mm"), (mixture, "loop")):
            inputs = [tensor.clone().requires_grad_() for tensor in (tokens, weights, gate_up, down)]
            output = mix(inputs[0], inputs[1], chosen, inputs[2], inputs[3], backend)
            results.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
        found[f"rows_{rows}"] = worst(*results)
    return found


def check_head(bench: Bench) -> None:
    """The head against the trainer's present one in float32, the kernel against its twin in bfloat16."""
    generator = torch.Generator().manual_seed(2)
    vocabulary, hidden_size, tokens = (514, 64, 96) if bench.small else (10_050, 512, 700)
    hidden, weight = (torch.randn(n, hidden_size, generator=generator) * 0.3 for n in (tokens, vocabulary))
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::7] = -100
    with bench.guarded("head_float32"):
        results = []
        for place, function in (("cpu", token_logprobs), (bench.device, label_logprobs)):
            h, w = (tensor.to(place).requires_grad_() for tensor in (hidden, weight))
            keywords = {} if function is token_logprobs else {"uniform": True, "piece": 256}
            logprobs = function(h, w, labels.to(place), **keywords)  # type: ignore[operator]
            results.append([logprobs, *torch.autograd.grad(-logprobs.sum() / 100, (h, w))])
        bench.record("head_float32", to_present=worst(results[1], results[0]))
    with bench.guarded("head_bfloat16"):
        logits = torch.randn(tokens, heads.padded(vocabulary), generator=generator).to(bench.device, BF16) * 4
        twin, placed = logits.clone(), labels.to(bench.device)
        ours = heads.logprobs_and_gradient(logits, placed, vocabulary, True)
        plain = heads.plain_logprobs_and_gradient(twin, placed, vocabulary, True)
        distances = {"logprobs": distance(ours, plain), "gradient": distance(logits, twin)}
        padding, adds_wide = float(logits[:, vocabulary:].abs().max()), bench.cuda and heads._adds_wide(bench.device)
        bench.record("head_bfloat16", **distances, padding=padding, adds_wide=adds_wide)


def check_split(bench: Bench) -> None:
    """The optimizer: kernel against twin, exact split against a float32 weight, host against device, by bits."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(300, 257), (5000,)]
    start = [torch.randn(shape, generator=generator) * 0.02 for shape in shapes]
    steps = [[torch.randn(shape, generator=generator).to(BF16) * 1e-3 for shape in shapes] for _ in range(20)]

    def run(place: torch.device, dtype: torch.dtype, host: bool) -> list[Tensor]:
        weights = [nn.Parameter(tensor.to(place, dtype, copy=True)) for tensor in start]
        optimizer = SplitAdamW(weights, host=host, masters=start)
        for gradients_ in steps:
            for weight, gradient in zip(weights, gradients_, strict=True):
                weight.grad = gradient.to(place, dtype)
            optimizer.step(2e-7, 1.0)
        return [optimizer.master(weight).cpu() for weight in weights]

    with bench.guarded("split"):
        split_ = run(bench.device, BF16, False)
        wide = run(bench.device, torch.float32, False)
        twin = run(torch.device("cpu"), BF16, False)
        host = run(bench.device, BF16, True)
        same = [all(torch.equal(a, b) for a, b in zip(split_, other, strict=True)) for other in (wide, host)]
        moved = max(distance(a - s, b - s) for a, b, s in zip(split_, twin, start, strict=True))
        bench.record("split", same_bits_as_float32=same[0], host_same_bits=same[1], displacement_to_cpu_twin=moved)


def check_muon(bench: Bench) -> None:
    """The directions of a step along matrices, in bfloat16 on an accelerator, against those in float32 on the CPU."""
    matrices = torch.randn(3, 96, 256, generator=torch.Generator().manual_seed(4)) * 0.01
    with bench.guarded("muon"):
        ours, twin = orthogonalized(matrices.to(bench.device), 5).float().cpu(), orthogonalized(matrices, 5)
        values = torch.linalg.svdvals(ours)
        bench.record("muon", to_cpu=distance(ours, twin), smallest=float(values.min()), largest=float(values.max()))


class Audit(TorchDispatchMode):
    """Counts grouped products in float32 and operations that wait for the device."""

    WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.item", "aten.bincount", "aten.equal")

    def __init__(self) -> None:
        super().__init__()
        self.wide_products, self.waits = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).rsplit(".", 1)[0]
        self.waits += name in self.WAITS
        self.wide_products += "grouped_mm" in name and args[0].dtype == torch.float32
        return function(*args, **(kwargs or {}))


def check_discipline(bench: Bench) -> None:
    """No synchronisation in forward and backward pass, no float32 grouped product."""
    size = middle(bench)
    chosen = choose_attention(bench.device, BF16)
    network = random_network(size.config, bench.device)
    data = batch(size, size.tokens, bench.device, 100)
    for mode in ("none", "selective", "full"):
        with bench.guarded(f"discipline_{mode}"):
            engine = Engine(size, network, chosen, False)
            step = engine.step(data, engine.modes(mode))
            step()
            with Audit() as audit:
                step()
            bench.record(f"discipline_{mode}", float32_grouped_products=audit.wide_products, waiting_operations=audit.waits)
            if bench.cuda:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                bench.record(f"discipline_{mode}", synchronisations=0)


# stack ------------------------------------------------------------------------------------------------------------------


def stack(bench: Bench) -> None:
    """Four layers and the head by the new engine."""
    tokens, chosen = bench.size.tokens, choose_attention(bench.device, BF16)
    sizes = {layers: bench.size.layers(layers) for layers in (4, 2)}
    network = random_network(sizes[4].config, bench.device)
    networks = {4: network, 2: network._replace(blocks=network.blocks[:2])}
    documents = bench.size.length // 6
    cases: list[tuple[str, bool, int, int | None]] = [
        ("selective", True, tokens, None),
        ("full", True, tokens, None),
        ("none", True, tokens, None),
        ("selective", True, tokens // 2, None),
        ("selective", True, tokens, documents),
        ("none", False, tokens, None),
        ("full", False, tokens, None),
    ]
    for mode, compiled, count, document in cases if bench.cuda else cases[-2:]:
        name = f"{mode}{'_compiled' if compiled else '_eager'}_{count}{'_documents' if document else ''}"
        with bench.guarded(name, 12):
            found: dict[int, float] = {}
            for layers in (4, 2):
                bench.free()
                clear(network)
                engine = Engine(sizes[layers], networks[layers], chosen, compiled)
                step = engine.step(batch(sizes[layers], count, bench.device, document), engine.modes(mode))
                begun = time.monotonic()
                loss = float(step())
                first = time.monotonic() - begun
                found[layers] = bench.ms(step, 4)
                values = rates(sizes[layers], found[layers], count)
                bench.record(
                    name,
                    **{f"layers_{layers}": values | {"peak_gib": bench.peak(), "first_s": round(first, 1), "loss": round(loss, 4)}},
                )
            extrapolate(bench, name, found, count)
    clear(network)


def extrapolate(bench: Bench, name: str, found: dict[int, float], tokens: int) -> None:
    """What 24 layers would take, by the difference of 4 and 2."""
    layer = (found[4] - found[2]) / 2
    whole = found[4] + layer * (REAL.config.num_hidden_layers - 4)
    size = replace(bench.size, config=REAL.config)
    rest = found[2] - 2 * layer
    bench.record(name, layer_ms=round(layer, 2), rest_ms=round(rest, 2), extrapolated_24=rates(size, whole, tokens))


# whole ------------------------------------------------------------------------------------------------------------------


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


# baselines --------------------------------------------------------------------------------------------------------------


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


# parts ------------------------------------------------------------------------------------------------------------------


def both_ways(function: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], None]:
    """A function that runs forward and backward."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        output = function()
        output.backward(torch.ones_like(output))

    return run


def random_leaf(bench: Bench, *shape: int, scale: float = 1.0) -> Tensor:
    """Random numbers in bfloat16, with gradients."""
    return (torch.randn(*shape, device=bench.device, dtype=BF16) * scale).requires_grad_()


def parts(bench: Bench) -> None:
    """Single parts at the real shapes."""
    attention_parts(bench)
    head_parts(bench)
    expert_parts(bench)
    optimizer_part(bench)
    if bench.cuda:  # FlexAttention has no backward pass on a CPU
        flex_parts(bench)


def attention_leaves(bench: Bench) -> list[Tensor]:
    """Queries, keys and values of a layer."""
    c = bench.size.config
    assert c.head_dim is not None
    heads_ = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
    return [random_leaf(bench, bench.size.tokens, number, c.head_dim) for number in heads_]


def attention_parts(bench: Bench) -> None:
    """Attention by backend, with and without window and documents, and by cuDNN on rows of one document."""
    c, tokens, length = bench.size.config, bench.size.tokens, bench.size.length
    query, key, value = attention_leaves(bench)

    def measure(name: str, packed: Packing, window: int | None, label: str) -> None:
        with bench.guarded(label, 3):
            backend = ATTENTION[name]
            prepare = bench.ms(lambda: backend.prepare(packed, window), 1)
            prepared = backend.prepare(packed, window)

            def attend() -> Tensor:
                return backend.attend(query, key, value, prepared)

            with torch.no_grad():
                forward_ms = bench.ms(attend, 3)
            ms = bench.ms(both_ways(attend, query, key, value), 3)
            bench.record(label, ms=round(ms, 3), forward_ms=round(forward_ms, 3), prepare_ms=round(prepare, 3))

    for document in (None, length // 4):
        packed = batch(bench.size, tokens, bench.device, document)[2]
        for window in (None, c.sliding_window):
            for name in ("varlen", "varlen-spread") if bench.cuda else ("masked",):
                kind = f"{'window' if window else 'full'}_{'documents' if document else 'rows'}"
                measure(name, packed, window, f"attention_{name}_{kind}")
    with bench.guarded("attention_cudnn_causal_rows", 3):
        groups = c.num_attention_heads // c.num_key_value_heads

        def causal() -> Tensor:
            rows = [tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in (query, key, value)]
            wide = [rows[0], *(tensor.repeat_interleave(groups, 1) for tensor in rows[1:])]
            return F.scaled_dot_product_attention(*wide, is_causal=True).transpose(1, 2).reshape(tokens, -1)

        bench.record("attention_cudnn_causal_rows", ms=round(bench.ms(both_ways(causal, query, key, value), 3), 3))


def flex_parts(bench: Bench) -> None:
    """FlexAttention, last, because its kernels take long to compile."""
    query, key, value = attention_leaves(bench)
    packed = batch(bench.size, bench.size.tokens, bench.device)[2]
    for window in (None, bench.size.config.sliding_window):
        name = f"attention_flex_{'window' if window else 'full'}_rows"
        with bench.guarded(name, 12):
            prepared = ATTENTION["flex"].prepare(packed, window)
            run = both_ways(partial(ATTENTION["flex"].attend, query, key, value, prepared), query, key, value)
            bench.record(name, ms=round(bench.ms(run, 3), 3))
    with bench.guarded("attention_flex", 12):
        bench.record("attention_flex", distance_bf16=attention_distance("flex", bench.device, BF16))


def head_parts(bench: Bench) -> None:
    """The head by size of its pieces, and its softmax alone."""
    c, tokens = bench.size.config, bench.size.tokens
    hidden, weight = random_leaf(bench, tokens, c.hidden_size), random_leaf(bench, c.vocab_size, c.hidden_size, scale=0.02)
    labels = torch.randint(0, c.vocab_size, (tokens,), device=bench.device)
    flops = 6 * tokens * c.vocab_size * c.hidden_size
    for piece in (None, 2048, 8192) if bench.cuda else (None,):
        name = f"head_{piece or 'chosen'}"
        with bench.guarded(name, 3):
            run = both_ways(partial(label_logprobs, hidden, weight, labels, uniform=True, piece=piece), hidden, weight)
            ms = bench.ms(run, 3)
            size = piece or heads.piece_size(c.vocab_size, BF16, bench.device)
            bench.record(name, piece=size, ms=round(ms, 2), tflops=round(flops / ms / 1e9, 1), peak_gib=bench.peak())
    with bench.guarded("head_softmax", 3):
        rows = min(tokens, 4096)
        logits = torch.randn(rows, heads.padded(c.vocab_size), device=bench.device, dtype=BF16)
        ms = bench.ms(partial(heads.logprobs_and_gradient, logits, labels[:rows], c.vocab_size, True), 3)
        bench.record("head_softmax", ms=round(ms, 3), gb_per_s=round(3 * logits.nbytes / ms / 1e6, 1))


def expert_parts(bench: Bench) -> None:
    """A layer's experts, evenly loaded and by Zipf's law."""
    c, tokens = bench.size.config, bench.size.tokens
    hidden = random_leaf(bench, tokens, c.hidden_size)
    gate_up = random_leaf(bench, c.num_local_experts, 2 * c.intermediate_size, c.hidden_size, scale=0.02)
    down = random_leaf(bench, c.num_local_experts, c.hidden_size, c.intermediate_size, scale=0.02)
    flops = 18 * tokens * c.num_experts_per_tok * c.hidden_size * c.intermediate_size
    compiled: Any = torch.compile(mixture, backend="inductor" if bench.cuda else "aot_eager")
    odds = {"even": torch.ones(c.num_local_experts), "zipf": 1 / torch.arange(1, c.num_local_experts + 1).float()}
    for kind, chance in odds.items():
        experts = torch.multinomial(chance.to(bench.device).expand(tokens, -1), c.num_experts_per_tok)
        weights = torch.full((tokens, c.num_experts_per_tok), 0.5, device=bench.device, requires_grad=True)
        for name in ("grouped_mm", "compiled", "loop"):
            with bench.guarded(f"experts_{name}_{kind}", 5):
                function, backend = (compiled, "grouped_mm") if name == "compiled" else (mixture, name)
                run = both_ways(partial(function, hidden, weights, experts, gate_up, down, backend), hidden, weights, gate_up, down)
                ms = bench.ms(run, 4, 2)
                bench.record(f"experts_{name}_{kind}", ms=round(ms, 2), tflops=round(flops / ms / 1e9, 1), peak_gib=bench.peak())


def optimizer_part(bench: Bench) -> None:
    """The optimizer's kernel over one large tensor."""
    with bench.guarded("optimizer_kernel", 3):
        weight = nn.Parameter(torch.randn(2**16 if bench.small else 2**28, device=bench.device, dtype=BF16))
        weight.grad = torch.randn_like(weight)
        optimizer = SplitAdamW([weight])
        ms = bench.ms(lambda: optimizer.step(1e-5, 1.0), 4, 2)
        rate = weight.numel() * 14.06 / ms / 1e6
        whole_model = ms / weight.numel() * 14.83e9
        bench.record("optimizer_kernel", ms=round(ms, 3), gb_per_s=round(rate, 1), whole_model_ms=round(whole_model, 1))


# toy --------------------------------------------------------------------------------------------------------------------


ADAMW = ["train.optimizer=adamw", "train.muon={}"]
TOY = {
    "fp32": [],
    "bfloat16": ["train.compute_dtype=bfloat16"],
    "split": [*ADAMW, "train.precision=split", "train.recompute=selective"],
    "split_host": [*ADAMW, "train.precision=split-host", "train.recompute=full"],
}
"""Settings of the toy recipe by the precision that is tried; its own optimizer goes with float32 alone."""


def toy(bench: Bench) -> None:
    """The toy pipeline by the command line, on one set of data; without an accelerator its first stage only."""
    root = Path(__file__).resolve().parent.parent
    modes = {name: TOY[name] for name in ("fp32", "split")} if bench.small else TOY
    with tempfile.TemporaryDirectory() as directory:
        for name, settings in modes.items():
            with bench.guarded(name, 10):
                command = [sys.executable, "-m", "keural", "run", str(root / "recipes/toy"), "--out", directory + "/toy", *settings]
                command += ["pretrain-1.train.steps=4", "pretrain-1.train.warmup_steps=1"] if bench.small else []
                command += ["--until", "sft-1" if name == "fp32" and not bench.small else "pretrain-1"]
                done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
                lines = [line for line in (done.stdout + done.stderr).splitlines() if "tok/s" in line or "held-out" in line]
                errors = done.stderr.strip().splitlines()[-3:] if done.returncode else []
                bench.record(name, exit_code=done.returncode, lines=lines, errors=errors)


# serve ------------------------------------------------------------------------------------------------------------------


def serve(bench: Bench) -> None:
    """The same prompts and lengths by the server's slots and by transformers' continuous batching."""
    size = bench.size
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16 if bench.cuda else torch.float32)
    try:
        with torch.device(bench.device):
            model = KeuralMoECausalLM(size.config).eval()
    finally:
        torch.set_default_dtype(before)
    length, answer = (8, 4) if bench.small else (128, 64)
    generator = torch.Generator().manual_seed(0)
    for streams in (1, 4) if bench.small else (1, 8, 32):
        prompts = torch.randint(4, size.config.vocab_size, (streams, length), generator=generator).tolist()
        with bench.guarded(f"slots_{streams}", 8):
            seconds, decoding = slots_seconds(model, prompts, answer)
            bench.record(
                f"slots_{streams}",
                tokens_per_s=round(streams * answer / seconds, 1),
                decoding_tokens_per_s=round(streams * (answer - 1) / decoding, 1),
                peak_gib=bench.peak(),
            )
        with bench.guarded(f"continuous_batching_{streams}", 15):
            seconds = continuous_seconds(bench, model, prompts, answer)
            bench.record(f"continuous_batching_{streams}", tokens_per_s=round(streams * answer / seconds, 1), peak_gib=bench.peak())


def slots_seconds(model: KeuralMoECausalLM, prompts: list[list[int]], answer: int) -> tuple[float, float]:
    """Seconds of a second pass for all tokens, and for those after the first."""
    from keural.serve.batching.slots import Row
    from keural.serve.batching.transformers_slots import TransformersSlots

    slots = TransformersSlots(model, len(prompts), len(prompts[0]) + answer)
    for _ in range(2):
        for slot in range(len(prompts)):
            slots.cut(slot, 0)
        begun = time.perf_counter()
        logits = slots.step([Row(slot, prompt, 0, True) for slot, prompt in enumerate(prompts)])
        tokens = logits.argmax(-1).tolist()
        first = time.perf_counter()
        for held in range(len(prompts[0]), len(prompts[0]) + answer - 1):
            tokens = slots.step([Row(slot, [token], held, True) for slot, token in enumerate(tokens)]).argmax(-1).tolist()
        ended = time.perf_counter()
    for module in model.modules():
        module._forward_hooks.clear()  # those that count experts: the next side does without
    return ended - begun, ended - first


def continuous_seconds(bench: Bench, model: KeuralMoECausalLM, prompts: list[list[int]], answer: int) -> float:
    """Seconds of a second pass."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=answer, eos_token_id=-1, pad_token_id=0)
    cache = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64) if bench.small else None
    for _ in range(2):
        begun = time.perf_counter()
        outputs = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=cache, progress_bar=False, warmup=False
        )
        seconds = time.perf_counter() - begun
        if [len(output.generated_tokens) for output in outputs.values()] != [answer] * len(prompts):
            raise ValueError("not all answers have their length")
    return seconds


PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "check": (check, 75),
    "stack": (stack, 140),
    "whole": (whole, 190),
    "baselines": (baselines, 50),
    "parts": (parts, 60),
    "toy": (toy, 60),
    "serve": (serve, 90),
}
"""Each with the seconds it may take at most; what is left over goes to the later ones."""


def run_part(name: str, out: Path, size: Size, deadline: float, small: bool) -> None:
    """In a process of its own."""
    started = time.monotonic()
    bench = Bench(name, out, size, deadline, small)
    try:
        PARTS[name][0](bench)
    except Exception as error:
        bench.record("stopped", error=f"{type(error).__name__}: {str(error)[:400]}", where=traceback.format_exc()[-800:])
    bench.record("part", seconds=round(time.monotonic() - started, 1))


def main() -> None:
    """Run the parts one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--seconds", type=float, default=470, help="for everything together")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    ends = time.monotonic() + options.seconds
    options.out.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")  # imports are done once; CUDA is first touched in the child
    for name in options.parts.split(","):
        limit = min(PARTS[name][1] * (3 if options.small else 1), ends - time.monotonic())
        if limit < 10:
            print(f"{name}: no time left", flush=True)
            continue
        deadline = time.monotonic() + limit
        child = context.Process(
            target=run_part, args=(name, options.out, SMALL if options.small else REAL, deadline, options.small)
        )
        child.start()
        child.join(limit)
        if child.is_alive():
            child.kill()
            child.join()
            print(f"{name}: stopped after {limit:.0f} s", flush=True)
        elif child.exitcode:
            print(f"{name}: ended with {child.exitcode}", flush=True)


if __name__ == "__main__":
    main()
