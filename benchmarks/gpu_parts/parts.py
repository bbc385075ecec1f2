"""Part `parts`: attention by backend, head by piece, experts and the optimizer's kernel, each alone at the real shapes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_parts.bench import BF16, Bench
from benchmarks.gpu_parts.networks import batch
from keural.train.network import head as heads
from keural.train.network.attention import ATTENTION, Packing, attention_distance
from keural.train.network.experts import mixture
from keural.train.network.head import label_logprobs
from keural.train.optimization.split import SplitAdamW


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
