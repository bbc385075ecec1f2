"""The head for accelerators gives what `losses.token_logprobs` gives, in any pieces, and waits for nothing."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from keural.train.losses import Weighing, token_logprobs
from keural.train.network.head import label_logprobs, piece_size
from keural.train.processes.modes import padded
from tests.helpers.examples import examples


def problem(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(number, 16, generator=draw, dtype=dtype, requires_grad=True) for number in (tokens, 50))
    labels = torch.randint(0, 50, (tokens,), generator=draw)
    labels[torch.rand(tokens, generator=draw) < 0.4] = -100
    return hidden, weight, labels


@examples(10)
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


def by_groups(ends: list[int], number: int) -> Weighing:
    """A loss of groups, each of which weighs by the sum of its own log-probabilities."""

    def slopes(logprobs: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            found: torch.Tensor = torch.autograd.grad(loss_of_groups(leaf, ends), leaf)[0]
        return found

    return Weighing(tuple(ends), slopes)


def loss_of_groups(logprobs: torch.Tensor, ends: list[int]) -> torch.Tensor:
    begins = [0, *ends[:-1]]
    groups = [logprobs[begin:end].sum() for begin, end in zip(begins, ends, strict=True)]
    return torch.stack([torch.sigmoid(0.05 * group) for group in groups]).sum()


class Products(TorchDispatchMode):
    """Counts products that give logits, and the places in memory that these take."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows, self.places = width, 0, set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ == "mm" and result.shape[1] == self.width:
            self.rows += len(result)
            self.places.add(result.untyped_storage().data_ptr())
        return result


class TestOnePass:
    """A loss that says how it weighs labels, group by group, needs no second pass over the head."""

    @examples(10)
    @given(
        tokens=st.integers(1, 40), piece=st.integers(1, 50), seed=st.integers(0, 99), cuts=st.sets(st.integers(1, 39), max_size=6)
    )
    def test_values_and_gradients_are_those_of_two(self, tokens: int, piece: int, seed: int, cuts: set[int]) -> None:
        hidden, weight, labels = problem(tokens, seed)
        ends = sorted({min(cut, tokens) for cut in cuts} | ({tokens} if seed % 2 or not cuts else set()))
        found = []
        for weighing in (None, by_groups(ends, tokens)):
            logprobs = label_logprobs(hidden, weight, labels, uniform=False, piece=piece, weighing=weighing)
            found.append((logprobs, *torch.autograd.grad(0.3 * loss_of_groups(logprobs, ends), (hidden, weight))))
        torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)

    def test_every_position_is_projected_once(self) -> None:
        hidden, weight, labels = problem(40, 1)
        rows = {}
        for name, weighing in {"told": by_groups([10, 22, 40], 40), "not told": None}.items():
            with Products(64) as products:
                logprobs = label_logprobs(hidden, weight, labels, uniform=False, piece=16, weighing=weighing)
                loss_of_groups(logprobs, [10, 22, 40]).backward()
            rows[name] = products.rows
        assert rows["told"] == 40 + 18, "a group that is larger than a piece is projected again"
        assert rows["not told"] == 2 * 40

    def test_what_is_told_wrongly_is_noticed_on_a_cpu(self) -> None:
        hidden, weight, labels = problem(30, 2)
        upstream = torch.randn(30, generator=torch.Generator().manual_seed(1))
        expected = torch.autograd.grad((label_logprobs(hidden, weight, labels, uniform=False) * upstream).sum(), weight)
        told = label_logprobs(hidden, weight, labels, uniform=False, weighing=by_groups([10, 30], 30))
        torch.testing.assert_close(torch.autograd.grad((told * upstream).sum(), weight), expected, atol=1e-6, rtol=1e-5)

    def test_in_float64(self) -> None:
        hidden, weight, labels = problem(9, 0, torch.float64)
        ends = [4, 9]

        def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            logprobs = label_logprobs(h, w, labels, uniform=False, piece=5, weighing=by_groups(ends, 9))
            return loss_of_groups(logprobs, ends)

        assert torch.autograd.gradcheck(loss, (hidden, weight))

    def test_nothing_is_read_back_in_the_forward_pass(self) -> None:
        hidden, weight, labels = problem(20, 1)
        waits = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                waits.extend([name] if (name := function.overloadpacket.__name__) in ("nonzero", "_local_scalar_dense") else [])
                return function(*args, **(kwargs or {}))

        slopes = torch.linspace(0, 1, 20)
        with Watch():
            label_logprobs(hidden, weight, labels, uniform=False, piece=8, weighing=Weighing((5, 20), lambda _: slopes))
        assert waits == []


@pytest.mark.parametrize("way", ["uniform", "told", "two passes"])
def test_one_piece_of_logits_is_there_at_a_time(way: str) -> None:
    """All pieces of a pass are made in the same memory."""
    hidden, weight, labels = problem(40, 1)
    with Products(64) as forward:
        weighing = by_groups([8, 20, 40], 40) if way == "told" else None
        logprobs = label_logprobs(hidden, weight, labels, uniform=way == "uniform", piece=12, weighing=weighing)
    assert len(forward.places) == 1
    assert forward.rows >= 40
    with Products(64) as backward:
        (loss_of_groups(logprobs, [8, 20, 40]) if way != "uniform" else logprobs.sum()).backward()
    assert len(backward.places) == (way == "two passes")


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
