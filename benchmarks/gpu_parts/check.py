"""Part `check`: correctness, and what the card can do.

In: the engine's paths on the device. Out: their distances from twins on the CPU, from float64 and from themselves, run twice.
"""

import math
import os
import subprocess
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_parts.bench import BF16, GIB, Bench, Size
from benchmarks.gpu_parts.networks import Engine, batch, clear, distance, parameters, random_network
from keural.model import KeuralConfig
from keural.train.losses import token_logprobs
from keural.train.network import head as heads
from keural.train.network.attention import Packing, attention_distance, choose_attention
from keural.train.network.block import BlockWeights, Network
from keural.train.network.experts import mixture
from keural.train.network.head import label_logprobs
from keural.train.network.layers import COMPILED
from keural.train.optimization.muon import orthogonalized
from keural.train.optimization.split import SplitAdamW


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
