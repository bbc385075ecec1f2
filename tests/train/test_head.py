"""The head for accelerators gives what `losses.token_logprobs` gives, in any pieces, and waits for nothing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from keural.train.losses import token_logprobs
from keural.train.network.head import label_logprobs, piece_size
from keural.train.processes.modes import padded


def problem(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(number, 16, generator=draw, dtype=dtype, requires_grad=True) for number in (tokens, 50))
    labels = torch.randint(0, 50, (tokens,), generator=draw)
    labels[torch.rand(tokens, generator=draw) < 0.4] = -100
    return hidden, weight, labels


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), piece=st.integers(1, 50), seed=st.integers(0, 99), uniform=st.booleans())
def test_equals_token_logprobs_gradients_included(tokens: int, piece: int, seed: int, uniform: bool) -> None:
    hidden, weight, labels = problem(tokens, seed)
    upstream = torch.full((tokens,), -0.3) if uniform else torch.randn(tokens, generator=torch.Generator().manual_seed(seed))
    ours = label_logprobs(hidden, weight, labels, uniform=uniform, piece=piece)
    theirs = token_logprobs(hidden, weight, labels)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad((ours * upstream).sum(), (hidden, weight))
    expected = torch.autograd.grad((theirs * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("uniform", [True, False])
def test_gradcheck_in_float64(uniform: bool) -> None:
    hidden, weight, labels = problem(7, 0, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: label_logprobs(h, w, labels, uniform=uniform, piece=3).sum(), (hidden, weight))
    if not uniform:
        assert torch.autograd.gradcheck(lambda h, w: label_logprobs(h, w, labels, uniform=False, piece=3), (hidden, weight))


@pytest.mark.parametrize("uniform", [True, False])
def test_a_frozen_head_gets_no_tensor_for_a_gradient(uniform: bool) -> None:
    hidden, weight, labels = problem(20, 1)
    shapes: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            shapes.extend([tuple(result.shape)] if isinstance(result, torch.Tensor) else [])
            return result

    def gradient_and_tensors_of_the_heads_size(trained: bool) -> tuple[torch.Tensor, int]:
        shapes.clear()
        head = weight.detach().requires_grad_(trained)
        with Watch():
            logprobs = label_logprobs(hidden, head, labels, uniform=uniform)
            found = torch.autograd.grad(logprobs.sum(), (hidden, head) if trained else (hidden,))
        return found[0], shapes.count((padded(50), 16))

    expected, number = gradient_and_tensors_of_the_heads_size(trained=True)
    found, fewer = gradient_and_tensors_of_the_heads_size(trained=False)
    assert torch.equal(found, expected)
    assert fewer == 1 < number, "its aligned copy alone"


def test_nothing_is_read_back_and_products_have_aligned_rows() -> None:
    hidden, weight, labels = problem(20, 1)
    waits, widths = [], set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            if name in ("nonzero", "_local_scalar_dense", "item", "is_nonzero", "equal"):
                waits.append(name)
            if name == "mm" and result.shape[1] > 16:
                widths.add(result.shape[1])
            return result

    with Watch():
        label_logprobs(hidden, weight, labels, uniform=True, piece=8).sum().backward()
    assert waits == []
    assert widths == {64}


def test_pieces_are_sized_for_the_device() -> None:
    assert padded(131_074) == 131_136
    assert piece_size(131_074, torch.bfloat16, torch.device("cuda")) == 4096
    assert piece_size(131_074, torch.float32, torch.device("cpu")) == 63
