"""Log-probabilities and router losses equal their dense formulas, gradients included."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from keural.model import router_losses
from keural.train.losses import Weighing, balance_loss, router_statistics, token_logprobs, z_loss
from keural.train.micro_batches import group_ends
from tests.helpers.examples import examples
from tests.helpers.train_small import VOCAB, open_run, random_model, small_job, step_gradients


def dense_logprobs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logprobs = (hidden.float() @ weight.float().T).log_softmax(-1)
    return torch.where(labels >= 0, logprobs.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1), 0.0)


def problem(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 16, generator=generator, dtype=dtype)
    weight = torch.randn(50, 16, generator=generator, dtype=dtype)
    labels = torch.randint(0, 50, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@examples(10)
@given(tokens=st.integers(0, 40), chunk=st.integers(1, 50), seed=st.integers(0, 99), same=st.booleans())
def test_values_and_gradients_equal_the_dense_formula_for_any_chunk(tokens: int, chunk: int, seed: int, same: bool) -> None:
    hidden, weight, labels = problem(tokens, seed)
    upstream = torch.full((tokens,), -0.3) if same else torch.randn(tokens, generator=torch.Generator().manual_seed(seed))
    ours = token_logprobs(hidden, weight, labels, chunk)
    dense = dense_logprobs(hidden, weight, labels)
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
    ours_gradients = torch.autograd.grad((ours * upstream).sum(), (hidden, weight))
    dense_gradients = torch.autograd.grad((dense * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(ours_gradients, dense_gradients, atol=1e-5, rtol=1e-5)


def test_gradcheck_in_float64() -> None:
    hidden, weight, labels = problem(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, labels, 3), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, labels, 3).sum(), (hidden, weight))


def test_bfloat16_products_are_reduced_in_float32() -> None:
    hidden, weight, labels = problem(30)
    ours = token_logprobs(hidden.bfloat16(), weight, labels, 8)
    assert ours.dtype == torch.float32
    dense = dense_logprobs(hidden.bfloat16(), weight.bfloat16(), labels)
    torch.testing.assert_close(ours, dense, atol=0.1, rtol=0)
    assert torch.autograd.grad(ours.sum(), weight)[0].dtype == torch.float32


def test_no_more_logits_exist_than_one_chunk_has() -> None:
    hidden, weight, labels = problem(64)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[-1] == 50:
                largest.append(result.shape[0])
            return result

    with Watch():
        token_logprobs(hidden, weight, labels, 20).sum().backward()
    assert max(largest) == 20  # the 16 x 50 transposed head weight is smaller


def router_problem() -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    real = torch.rand(40, generator=generator) < 0.7
    return tuple(torch.randn(40, 4, generator=generator).requires_grad_() for _ in range(3)), real


def test_router_losses_equal_the_models_own_formula() -> None:
    logits, real = router_problem()
    statistics = router_statistics(logits, real, 2)
    balance, z = router_losses(logits, 2, real)
    torch.testing.assert_close(balance_loss(statistics, statistics.counts, statistics.tokens), balance)
    torch.testing.assert_close(z_loss(statistics, statistics.tokens), z)


def test_parts_of_a_batch_add_up_to_the_losses_of_the_whole_with_their_gradients() -> None:
    logits, real = router_problem()
    whole = router_statistics(logits, real, 2)
    parts = [router_statistics([layer[half] for layer in logits], real[half], 2) for half in (slice(0, 13), slice(13, 40))]
    counts = sum(part.counts for part in parts)
    tokens = sum(part.tokens for part in parts)
    split = sum(balance_loss(part, counts, tokens) + z_loss(part, tokens) for part in parts)
    together = balance_loss(whole, whole.counts, whole.tokens) + z_loss(whole, whole.tokens)
    torch.testing.assert_close(split, together)
    torch.testing.assert_close(torch.autograd.grad(split, logits), torch.autograd.grad(together, logits))


def test_padding_is_neither_counted_nor_charged() -> None:
    logits, real = router_problem()
    statistics = router_statistics(logits, real, 2)
    loss = balance_loss(statistics, statistics.counts, statistics.tokens) + z_loss(statistics, statistics.tokens)
    assert statistics.counts.sum(-1).tolist() == [2 * int(real.sum())] * 3
    for gradient in torch.autograd.grad(loss, logits):
        assert gradient[~real].abs().max() == 0


def test_uniform_router_scores_one_and_the_square_of_the_log_of_the_experts() -> None:
    statistics = router_statistics([torch.zeros(16, 4)], torch.ones(16, dtype=torch.bool), 2)
    even = torch.full((1, 4), 8.0)
    assert balance_loss(statistics, even, 16).item() == pytest.approx(1.0)
    assert z_loss(statistics, 16).item() == pytest.approx(math.log(4) ** 2)
    assert (statistics.entropies / 16).tolist() == pytest.approx([math.log(4)])


def test_routing_entropy_is_the_mean_of_the_tokens_own_not_that_of_the_mean() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    statistics = router_statistics([logits], torch.tensor([True, True, False]), 1)
    sharp = torch.softmax(logits[0].double(), -1)
    assert statistics.entropies.item() == pytest.approx(2 * float(-(sharp * sharp.log()).sum()), rel=1e-4)


def test_the_margin_is_between_the_two_most_probable_experts_of_every_token_whatever_is_chosen() -> None:
    logits, real = router_problem()
    sharp = torch.stack([layer[real] for layer in logits]).softmax(-1).sort(-1, descending=True).values
    for top_k in (1, 2, 4):
        found = router_statistics(logits, real, top_k).margins
        torch.testing.assert_close(found, (sharp[..., 0] - sharp[..., 1]).sum(-1))
    assert router_statistics([torch.zeros(16, 1)], torch.ones(16, dtype=torch.bool), 1).margins.tolist() == [16.0]


def test_counts_are_the_assignments_that_the_model_makes() -> None:
    model = random_model(scale=3.0)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
    ids = torch.randint(4, 96, (3, 20))
    logits = model.model(ids, output_router_logits=True, use_cache=False).router_logits
    statistics = router_statistics(logits, torch.ones(60, dtype=torch.bool), 2)
    expected = torch.stack([F.one_hot(layer, 4).sum((0, 1)).float() for layer in chosen])
    torch.testing.assert_close(statistics.counts, expected, atol=0, rtol=0)


def pairwise_loss(logprobs: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """A loss of sums over groups of labels, each weighed by where its group stands."""
    sums = torch.stack([part.sum() for part in logprobs.split([end - begin for begin, end in zip([0, *ends], ends, strict=False)])])
    return -F.logsigmoid(0.3 * sums + 1).sum()


def weighing(ends: list[int]) -> Weighing:
    def slopes(logprobs: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            return torch.autograd.grad(pairwise_loss(leaf, ends), leaf)[0]

    return Weighing(tuple(ends), slopes)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """How many positions were projected onto the vocabulary, and the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default and result.shape[-1] == 50:
            self.positions.append(result.shape[0])
        return result


class TestOnePass:
    """A loss whose slopes are known group by group needs one projection of each label, like one that weighs all alike."""

    @examples(10)
    @given(cuts=st.sets(st.integers(1, 39), max_size=12), chunk=st.integers(1, 50), seed=st.integers(0, 99))
    def test_values_and_gradients_equal_the_dense_formula(self, cuts: set[int], chunk: int, seed: int) -> None:
        hidden, weight, labels = problem(40, seed)
        ends = sorted(cuts | {40})
        ours = token_logprobs(hidden, weight, labels, chunk, weighing(ends))
        dense = dense_logprobs(hidden, weight, labels)
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
        ours_gradients = torch.autograd.grad(pairwise_loss(ours, ends) / 7, (hidden, weight))
        dense_gradients = torch.autograd.grad(pairwise_loss(dense, ends) / 7, (hidden, weight))
        torch.testing.assert_close(ours_gradients, dense_gradients, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(("ends", "chunk", "passes"), [([20, 40, 64], 40, 1), ([64], 64, 1), ([64], 16, 2), ([8, 64], 16, 2)])
    def test_labels_are_projected_once_where_a_group_fits_into_a_piece(self, ends: list[int], chunk: int, passes: int) -> None:
        hidden, weight, labels = problem(64)
        with Products() as found:
            logprobs = token_logprobs(hidden, weight, labels, chunk, weighing(ends))
            pairwise_loss(logprobs, ends).backward()
        begun = ends[-2] if passes == 2 and len(ends) > 1 else 0
        once, counted = int((labels[:begun] >= 0).sum()), int((labels >= 0).sum())
        assert sum(found.positions) == once + passes * (counted - once)
        assert max(found.positions) <= chunk

    @pytest.mark.parametrize("chunk", [5, 64])
    def test_another_loss_than_was_told_has_the_right_gradients(self, chunk: int) -> None:
        hidden, weight, labels = problem(64)
        upstream = torch.randn(64, generator=torch.Generator().manual_seed(1))
        ours = torch.autograd.grad((token_logprobs(hidden, weight, labels, chunk, weighing([30, 64])) * upstream).sum(), weight)
        dense = torch.autograd.grad((dense_logprobs(hidden, weight, labels) * upstream).sum(), weight)
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)

    def test_a_loss_that_has_no_slope_left_gives_zeros(self) -> None:
        hidden, weight, labels = problem(20)
        flat = Weighing((20,), torch.zeros_like)
        logprobs = token_logprobs(hidden, weight, labels, 8, flat)
        assert not any(gradient.any() for gradient in torch.autograd.grad((logprobs * 0).sum(), (hidden, weight)))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_training_on_pairs_takes_one_pass_over_the_head(tmp_path: Path, loss: str) -> None:
    trainer = open_run(small_job(tmp_path, "dpo", dpo={"loss": loss})).trainer
    labels = trainer.stream.batch(0).num_labels
    found = []

    def watch(function: Any) -> Any:
        def linear(hidden: torch.Tensor, matrix: torch.Tensor, *bias: Any) -> torch.Tensor:
            if matrix.shape[0] == VOCAB:
                found.append(len(hidden))
            return torch.Tensor(function(hidden, matrix, *bias))

        return linear

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keural.train.losses.F.linear", watch(F.linear))
        step_gradients(trainer)
    assert sum(found) == labels


def test_groups_end_where_no_pair_goes_on() -> None:
    """Pairs of one row follow each other; sides in rows of their own make one group of all that overlap."""

    def ends(positions: list[int], sides: list[int], pairs: int) -> tuple[int, ...]:
        return group_ends(np.array(positions), np.array(sides) % pairs, pairs)

    assert ends([0, 1, 2, 3, 5, 6, 7], [0, 0, 2, 2, 1, 3, 3], 2) == (4, 8)
    assert ends([0, 5, 10, 2, 7, 12], [0, 1, 2, 3, 4, 5], 3) == (3, 8, 13)
    assert ends([0, 1, 2, 3], [0, 1, 2, 3], 2) == (4,)
    assert group_ends(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 0) == ()
