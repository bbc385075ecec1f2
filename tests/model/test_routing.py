"""Router, experts and router losses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from keural.model import KeuralConfig, router_losses
from keural.model.modeling_keural import KeuralExperts, KeuralTopKRouter
from tests.helpers.examples import examples
from tests.helpers.tiny_network import MakeConfig, MakeModel, Tokens


def small_experts(experts: int, implementation: str = "eager") -> KeuralExperts:
    config = KeuralConfig(
        vocab_size=10, hidden_size=6, intermediate_size=5, num_attention_heads=1, num_key_value_heads=1,
        num_local_experts=experts, num_experts_per_tok=1, experts_implementation=implementation,
    )  # fmt: skip
    module = KeuralExperts(config).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def dense_mixture(module: KeuralExperts, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Every token through every expert; the weights select."""
    gate, up = torch.einsum("nh,eih->nei", states, module.gate_up_proj).chunk(2, dim=-1)
    outputs = torch.einsum("nei,ehi->neh", F.silu(gate) * up, module.down_proj)
    outputs = torch.cat((outputs, torch.zeros_like(outputs[:, :1])), dim=1)  # the expert of another process
    return (outputs.gather(1, index[..., None].expand(-1, -1, states.shape[1])) * weights[..., None]).sum(1)


@examples(10)
@given(
    tokens=st.integers(1, 12), experts=st.integers(1, 5), top_k=st.integers(1, 3), foreign=st.booleans(), seed=st.integers(0, 999)
)
def test_experts_mix_what_the_router_chose(tokens: int, experts: int, top_k: int, foreign: bool, seed: int) -> None:
    torch.manual_seed(seed)
    module = small_experts(experts)
    states = torch.randn(tokens, 6, dtype=torch.float64)
    index = torch.randint(0, experts + foreign, (tokens, top_k))
    weights = torch.rand(tokens, top_k, dtype=torch.float64)
    torch.testing.assert_close(module(states, index, weights), dense_mixture(module, states, index, weights))


def test_experts_keep_the_dtype_of_their_input() -> None:
    module = small_experts(4).bfloat16()
    states, index = torch.randn(7, 6, dtype=torch.bfloat16), torch.randint(0, 4, (7, 2))
    assert module(states, index, torch.rand(7, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_router_takes_the_two_largest_of_the_softmax_and_renormalises(tiny_config: MakeConfig) -> None:
    torch.manual_seed(0)
    router = KeuralTopKRouter(tiny_config())
    torch.nn.init.normal_(router.weight)
    logits, weights, index = router(torch.randn(3, 7, 24))
    assert logits.shape == (21, 5)
    two = logits.topk(2, dim=-1)
    assert torch.equal(index, two.indices)
    torch.testing.assert_close(weights, two.values.softmax(-1))  # renormalising afterwards is a softmax over the chosen


def test_router_logits_keep_the_model_dtype(tiny_config: MakeConfig) -> None:
    router = KeuralTopKRouter(tiny_config()).bfloat16()
    torch.nn.init.normal_(router.weight)
    logits, weights, _ = router(torch.randn(4, 24, dtype=torch.bfloat16))
    assert logits.dtype == weights.dtype == torch.bfloat16


def test_zero_logits_cost_what_the_published_model_logs() -> None:
    balance, z = router_losses((torch.zeros(16, 8),) * 24, top_k=2)
    assert (0.02 * balance + 0.001 * z).item() == pytest.approx(0.024324, abs=5e-7)


def test_collapse_on_two_experts_costs_four() -> None:
    logits = torch.tensor([[50.0, 20.0, 0, 0, 0, 0, 0, 0]]).expand(32, -1)
    assert router_losses((logits,), top_k=2)[0].item() == pytest.approx(4.0, abs=1e-5)


def naive_losses(layers: tuple[torch.Tensor, ...], top_k: int) -> tuple[float, float]:
    balance, z = 0.0, 0.0
    for logits in layers:
        experts = logits.shape[1]
        mean, counts, squares = [0.0] * experts, [0] * experts, 0.0
        for row in logits.tolist():
            log_sum = math.log(sum(math.exp(v) for v in row))
            squares += log_sum**2
            for e, value in enumerate(row):
                mean[e] += math.exp(value - log_sum) / len(logits)
            for e in sorted(range(experts), key=lambda e: -row[e])[:top_k]:
                counts[e] += 1
        balance += experts * sum(p * c / (len(logits) * top_k) for p, c in zip(mean, counts, strict=True))
        z += squares / len(logits)
    return balance / len(layers), z / len(layers)


def test_router_losses_are_those_of_a_naive_loop() -> None:
    torch.manual_seed(0)
    layers = tuple(torch.randn(20, 5) * 2 for _ in range(3))
    balance, z = router_losses(layers, top_k=2)
    expected = naive_losses(layers, 2)
    assert (balance.item(), z.item()) == pytest.approx(expected, rel=1e-5)


def test_tokens_that_do_not_count_change_nothing() -> None:
    torch.manual_seed(0)
    layers = tuple(torch.randn(20, 5) for _ in range(3))
    counted = torch.arange(20) % 3 > 0
    expected = router_losses(tuple(layer[counted] for layer in layers), top_k=2)
    torch.testing.assert_close(router_losses(layers, 2, counted.long()), expected)


def test_loss_is_cross_entropy_of_the_next_token_plus_the_weighted_router_losses(tiny_model: MakeModel, tokens: Tokens) -> None:
    model, ids = tiny_model(), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    plain = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    balance, z = router_losses(output.router_logits, 2, mask.flatten())
    torch.testing.assert_close(output.aux_loss, 0.02 * balance + 0.001 * z)
    torch.testing.assert_close(output.loss, plain + output.aux_loss)
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels).loss, plain)


def test_router_losses_ignore_padding_in_the_model(tiny_model: MakeModel, tokens: Tokens) -> None:
    model, ids = tiny_model(), tokens(1, 12)
    padded = torch.cat((torch.zeros(1, 5, dtype=ids.dtype), ids), dim=1)
    mask = (torch.arange(17) >= 5).long()[None]
    alone = model(ids, output_router_logits=True).aux_loss
    torch.testing.assert_close(model(padded, attention_mask=mask, output_router_logits=True).aux_loss, alone)


def test_configuration_can_ask_for_router_losses(tiny_model: MakeModel, tokens: Tokens) -> None:
    assert tiny_model(output_router_logits=True)(tokens(1, 5)).aux_loss is not None
    assert tiny_model()(tokens(1, 5)).aux_loss is None


def test_balance_loss_moves_the_router_and_only_through_the_probabilities() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    balance, _ = router_losses((logits,), top_k=1)
    share = F.one_hot(logits.argmax(-1), 4).float().mean(0)
    expected = torch.autograd.grad(4 * (logits.softmax(-1).mean(0) * share).sum(), logits)[0]
    torch.testing.assert_close(torch.autograd.grad(balance, logits)[0], expected)
