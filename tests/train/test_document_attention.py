"""Attention document by document is the dense masked one, forward and backward, however documents are packed."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keural.train.network.attention import ATTENTION, choose_attention, packing
from keural.train.network.document_attention import IMPLEMENTATION, document_offsets, stack_documents
from keural.train.network.policy import Policy
from tests.helpers.examples import examples
from tests.helpers.train_small import open_run, random_model, small_job, step_gradients

CPU = torch.device("cpu")


def positions_of(rows: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def both(rows: list[list[int]], window: int | None, heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float64) -> float:
    """Largest distance of output and gradients from the twin's."""
    packed = packing(positions_of(rows), CPU)
    tokens, generator = packed.rows * packed.length, torch.Generator().manual_seed(0)
    shapes = [(tokens, number, 8) for number in (heads, heads // groups, heads // groups, heads)]
    *inputs, upstream = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    results = []
    for name in ("documents", "masked"):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = ATTENTION[name].attend(*leaves, ATTENTION[name].prepare(packed, window))
        results.append([output.detach(), *torch.autograd.grad(output, leaves, upstream)])
    return max(float((ours - twin).abs().max()) for ours, twin in zip(*results, strict=True))


ROWS = {
    "one document": [[40]],
    "single tokens": [[1] * 40],
    "of all lengths": [[1, 2, 3, 34], [17, 23], [40], [10, 10, 10, 10]],
    "just longer than twice a window": [[15, 14, 11], [16, 24], [13, 13, 14]],
}


@pytest.mark.parametrize("rows", list(ROWS.values()), ids=list(ROWS))
@pytest.mark.parametrize("window", [None, 1, 2, 7, 8, 39, 40, 100])
def test_it_equals_the_dense_masked_oracle(rows: list[list[int]], window: int | None) -> None:
    assert both(rows, window) < 1e-12
    assert both(rows, window, dtype=torch.float32) < 1e-5


@examples(10)
@given(cuts=st.lists(st.integers(1, 95), max_size=12), rows=st.sampled_from([1, 3]), window=st.sampled_from([None, 5, 16, 60]))
def test_it_equals_the_oracle_for_any_documents(cuts: list[int], rows: int, window: int | None) -> None:
    bounds = sorted({0, 96, *cuts})
    assert both([[end - begin for begin, end in pairwise(bounds)]] * rows, window, groups=1) < 1e-12


def test_gradients_are_right_by_themselves() -> None:
    packed = packing(positions_of([[3, 5, 4]]), CPU)
    for window in (None, 2):
        prepared = ATTENTION["documents"].prepare(packed, window)
        inputs = [torch.randn(12, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        assert torch.autograd.gradcheck(lambda *heads, found=prepared: ATTENTION["documents"].attend(*heads, found), inputs)


def test_a_document_is_computed_alike_wherever_it_stands() -> None:
    """To the bit, among others of its length: so packing moves no loss."""
    heads = torch.randn(60, 4, 8)
    alone = ATTENTION["documents"].attend(
        *[heads[:20]] * 3, ATTENTION["documents"].prepare(packing(positions_of([[20]]), CPU), None)
    )
    among = ATTENTION["documents"].attend(
        *[torch.cat([heads[30:], heads[:20], heads[20:30]])] * 3,
        ATTENTION["documents"].prepare(packing(positions_of([[30, 20, 10]]), CPU), None),
    )
    assert torch.equal(among[30:50], alone)


@pytest.mark.parametrize("window", [None, 64])
def test_the_work_is_that_of_the_documents(window: int | None) -> None:
    """Of 6,605 tokens in documents of 20 to 400 no more is computed than a fifth of what the rows' masks would ask for."""
    lengths = np.random.default_rng(0).integers(20, 400, 30)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    stacks = stack_documents(offsets, window).stacks
    assert sum(stack.number * stack.length for stack in stacks) < (1.15 if window is None else 1.25) * offsets[-1]
    scores = [stack.number * (stack.length**2 if stack.mask is None else stack.mask.numel()) for stack in stacks]
    assert sum(scores) < 0.2 * offsets[-1] ** 2
    assert len(stacks) < 25


def test_where_documents_begin() -> None:
    rows = np.array([[0, 1, 2, 0, 1], [3, 4, 0, 0, 1]])
    assert document_offsets(rows).tolist() == [0, 3, 5, 7, 8, 10]


@pytest.mark.parametrize("objective", ["next_token", "sft", "dpo", "kto"])
def test_training_by_documents_gives_the_losses_and_gradients_of_masked_rows(tmp_path: object, objective: str) -> None:
    trainer = open_run(small_job(tmp_path, objective)).trainer  # type: ignore[arg-type]
    assert trainer.policy.by_documents
    losses, gradients = step_gradients(trainer)
    trainer.policy.by_documents = False  # the model then makes its own masks
    expected_losses, expected = step_gradients(trainer)
    for figures in (losses, expected_losses):
        figures.pop("reward_accuracy", None)  # before the first step margins are zero but for rounding, and it counts their signs
    torch.testing.assert_close(losses, expected_losses, atol=1e-6, rtol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6 * max(1, float(gradient.abs().max())), rtol=1e-4)


def test_the_model_itself_still_answers() -> None:
    """Called by itself, with or without a mask or a cache, it does what it does otherwise."""
    plain = random_model(scale=3.0)
    model = Policy(random_model(scale=3.0), torch.float32, by_documents=True).model
    assert model.config._attn_implementation == IMPLEMENTATION
    ids = torch.arange(10, 30)[None]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    padded = torch.ones(1, 20, dtype=torch.long)
    padded[:, :5] = 0
    torch.testing.assert_close(model(ids, attention_mask=padded).logits[:, 5:], plain(ids, attention_mask=padded).logits[:, 5:])
    assert torch.equal(*(each.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for each in (model, plain)))
    assert "attn" not in "".join(model.config.to_dict())


def test_who_attends_by_documents() -> None:
    assert choose_attention(CPU, torch.float32) == choose_attention(CPU, torch.bfloat16) == "documents"
    assert choose_attention(CPU, torch.float32, compiled=True) == "masked"
