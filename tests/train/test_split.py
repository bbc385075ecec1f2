"""Split weights are float32 weights, bit for bit, and their steps survive small learning rates."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from benchmarks.displacement import LABELS, WAYS, distances, plot
from keural.train.optimization import split as module
from keural.train.optimization.split import Rates, SplitAdamW, decode, encode, join, new_state, plain_update, split


def every_remainder(high: int) -> torch.Tensor:
    signed = high - 65536 if high > 32767 else high
    return ((torch.tensor(signed, dtype=torch.int32) << 16) + torch.arange(65536, dtype=torch.int32)).view(torch.float32)


@pytest.mark.parametrize("high", [0x0000, 0x0001, 0x3CA3, 0x3CA4, 0xBCA3, 0x7F7E])
def test_split_is_exact_and_nearest_for_every_remainder(high: int) -> None:
    master = every_remainder(high)
    weight, remainder = split(master)
    assert torch.equal(join(weight, remainder).view(torch.int32), master.view(torch.int32))
    assert bool(((weight.float() - master).abs() <= (master.bfloat16().float() - master).abs()).all())


def test_200_steps_are_bit_equal_to_float32_adamw_with_the_same_moments() -> None:
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(3000, generator=draw) * 0.02
    parts, whole = nn.Parameter(start.bfloat16()), nn.Parameter(start.clone())
    optimizers = [SplitAdamW([parts], masters=[start]), SplitAdamW([whole], masters=[start])]
    for _ in range(200):
        gradient = torch.randn(3000, generator=draw).bfloat16()
        parts.grad, whole.grad = gradient, gradient.float()
        for optimizer in optimizers:
            optimizer.step(2e-7, 1.0)
    assert torch.equal(optimizers[0].master(parts), whole.detach())
    assert torch.equal(parts.detach(), split(whole.detach())[0])


def test_one_step_is_that_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(4, 600, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    ours.grad = torch.randn(4, 600, generator=draw)
    theirs.grad = ours.grad.clone()
    SplitAdamW([ours], weight_decay=0.1).step(1e-2)
    torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1).step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-6, rtol=1e-6)


def test_a_thousand_steps_at_2e_7_move_the_weights_as_in_float32() -> None:
    """The figures of `docs/training.md`, by the benchmark that makes them."""
    found = distances(1.0, ["split", "bfloat16 weights"])
    assert found["split"][-1] < 0.01
    assert found["bfloat16 weights"][-1] > 0.9, "bfloat16 weights do not move: the test can tell"


def test_the_plot_of_the_page_is_what_the_benchmark_draws() -> None:
    """Curves and figures of a few steps stand in a file that needs no page around it."""
    found = {name: [0.9, 0.5] for name in WAYS} | {"split": [0.01, 0.005]}
    drawn = plot(found, 10)
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "split: 0.50% after 20 steps" in "".join(root.itertext())
    assert drawn.count("<polyline") == len(WAYS)
    assert "prefers-color-scheme: dark" in drawn
    kept = (Path(__file__).resolve().parents[2] / "docs" / "displacement.svg").read_text(encoding="utf-8")
    assert [line for line in LABELS.values() if line[0] not in kept] == []


def test_a_small_second_moment_beside_a_large_one_is_never_zero() -> None:
    values = torch.tensor([1.0, 1e-12, 0.0, *[0.5] * 300])
    codes, scales = encode(values, signed=False)
    assert codes[1] == 1
    assert codes[2] == 0
    torch.testing.assert_close(decode(codes, scales)[[0, 3]], values[[0, 3]], rtol=0.02, atol=0)
    signed = torch.tensor([-1.0, 0.25, -0.1])
    torch.testing.assert_close(decode(*encode(signed, signed=True)), signed, rtol=0.02, atol=0)


def test_clipping_is_that_of_torch_and_a_norm_that_is_not_finite_changes_nothing() -> None:
    weight = nn.Parameter(torch.randn(300).bfloat16())
    optimizer = SplitAdamW([weight])
    weight.grad = torch.full((300,), 2.0).bfloat16()
    assert float(optimizer.step(1e-3, 1.0)) == pytest.approx(2 * 300**0.5, rel=1e-3)
    state = optimizer.chunks[0].state
    clipped = decode(state.moment, state.moment_scale, state.block)
    torch.testing.assert_close(clipped, torch.full((300,), 0.1 / 300**0.5), rtol=0.01, atol=0)
    before = [optimizer.master(weight), *(tensor.clone() for tensor in optimizer.chunks[0].state.tensors())]
    weight.grad[7] = torch.inf
    optimizer.step(1e-3, 1.0)
    after = [optimizer.master(weight), *optimizer.chunks[0].state.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_chunks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (2**26, 1024):
        monkeypatch.setattr(module, "CHUNK", size)
        draw = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(5, 700, generator=draw).bfloat16())
        optimizer = SplitAdamW([weight])
        for _ in range(3):
            weight.grad = torch.randn(5, 700, generator=draw).bfloat16()
            optimizer.step(1e-3)
        results.append(optimizer.master(weight))
    assert torch.equal(*results)


def test_state_is_4_03_bytes_per_parameter() -> None:
    state = new_state(2**20, True, torch.device("cpu"))
    assert sum(tensor.nbytes for tensor in state.tensors()) / 2**20 == pytest.approx(4.03, abs=0.005)


KERNELS = """
import math, torch
from keural.train.network.head import plain_logprobs_and_gradient
from keural.train.network.kernels import logprobs_with_gradient, split_adamw
from keural.train.optimization.split import BLOCK, Rates, join, new_state, plain_update
draw = torch.Generator().manual_seed(0)
logits = torch.randn(5, 192, generator=draw) * 3
labels, twin = torch.tensor([3, -100, 129, 0, 7]), logits.clone()
torch.testing.assert_close(logprobs_with_gradient(logits, labels, 130, True), plain_logprobs_and_gradient(twin, labels, 130, True))
torch.testing.assert_close(logits, twin)
for exact in (True, False):
    start = torch.randn(3000, generator=draw) * 0.02
    states = [new_state(3000, exact, torch.device("cpu")) for _ in range(2)]
    weights = [start.bfloat16() if exact else start.clone() for _ in range(2)]
    for t in range(1, 4):
        gradient = torch.randn(3000, generator=draw).to(weights[0].dtype)
        rates = Rates(1 - 1e-4, 1e-3 / (1 - 0.9**t), math.sqrt(1 - 0.95**t), 0.9, 0.95, 1e-8)
        for skip in (0, 1):
            factor, skipped = torch.tensor(0.5), torch.tensor(skip, dtype=torch.int32)
            plain_update(weights[0], gradient, states[0], rates, factor, skipped)
            s = states[1]
            split_adamw(weights[1], s.remainder, gradient, s.moment, s.square, s.moment_scale, s.square_scale, factor, skipped,
                        BLOCK, rates.decay, rates.step_size, rates.root_correction, rates.beta1, rates.beta2, rates.eps)
    a, b = (join(w, s.remainder) if exact else w for w, s in zip(weights, states))
    assert (a - b).norm() < 1e-4 * (a - start).norm()  # a code that rounds the other way moves one weight a little
    assert (states[0].moment != states[1].moment).sum() < 5 and (states[0].square != states[1].square).sum() < 5
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with torch for accelerators")
def test_kernels_equal_their_twins_in_tritons_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", KERNELS], check=True, env=environment)


def test_plain_update_decays() -> None:
    weight, state = torch.ones(4), new_state(4, False, torch.device("cpu"))
    plain_update(weight, torch.zeros(4), state, Rates(0.9, 0.1, 1.0, 0.9, 0.95, 1e-8), torch.tensor(1.0), torch.tensor(0))
    torch.testing.assert_close(weight, torch.full((4,), 0.9))
