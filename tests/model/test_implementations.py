"""Every implementation of experts and attention that runs on a CPU computes the same function, compiled or not."""

from typing import Any

import pytest
import torch

from keural.model import KeuralMoECausalLM
from tests.helpers.tiny_network import MakeModel, Tokens


def forward_and_gradients(
    model: KeuralMoECausalLM, ids: torch.Tensor, **arguments: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    output = model(ids, labels=ids, output_router_logits=True, use_cache=False, **arguments)
    output.loss.backward()
    return output.logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_implementations_agree(tiny_model: MakeModel, tokens: Tokens, implementation: str) -> None:
    model, ids = tiny_model(), tokens(2, 20)
    expected = forward_and_gradients(model, ids)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(forward_and_gradients(model, ids), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_implementations_agree(tiny_model: MakeModel, tokens: Tokens, packed: bool) -> None:
    model, ids = tiny_model(attn_implementation="eager"), tokens(2, 20)
    arguments = {"position_ids": torch.cat((torch.arange(13), torch.arange(7))).expand(2, -1)} if packed else {}
    expected = forward_and_gradients(model, ids, **arguments)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(forward_and_gradients(model, ids, **arguments), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_agrees(tiny_model: MakeModel, tokens: Tokens) -> None:
    model, ids = tiny_model(head_dim=16), tokens(2, 160)
    expected = model(ids).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.slow  # compiling takes seconds; `make test-transformers` does it with every release
def test_the_whole_forward_and_backward_is_one_graph(tiny_model: MakeModel, tokens: Tokens) -> None:
    """In bfloat16, the one dtype whose grouped matrix product every supported transformers compiles in backward too."""
    model, ids = tiny_model(torch.bfloat16, hidden_size=32, intermediate_size=32), tokens(2, 20)
    model.set_experts_implementation("grouped_mm")
    logits, gradients = forward_and_gradients(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # one eager call has installed the recorders
    model.zero_grad(set_to_none=True)
    output = compiled(ids, labels=ids, output_router_logits=True, use_cache=False)
    output.loss.backward()
    torch.testing.assert_close(output.logits, logits)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() < 0.02 * gradients[name].norm(), name


@pytest.mark.slow
@torch.no_grad()
def test_compiled_kernels_agree(tiny_model: MakeModel, tokens: Tokens) -> None:
    model, ids = tiny_model(), tokens(2, 20)
    model.set_experts_implementation("grouped_mm")
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-3)


def test_hidden_states_and_attentions_can_be_recorded(tiny_model: MakeModel, tokens: Tokens) -> None:
    output = tiny_model(attn_implementation="eager")(tokens(1, 12), output_hidden_states=True, output_attentions=True)
    assert [states.shape for states in output.hidden_states] == [(1, 12, 24)] * 5
    assert [weights.shape for weights in output.attentions] == [(1, 4, 12, 12)] * 4


def test_half_precision_stays_close(tiny_model: MakeModel, tokens: Tokens) -> None:
    model, ids = tiny_model(initializer_range=0.1), tokens(2, 20)
    expected = model(ids).logits
    logits = model.to(torch.bfloat16)(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).std() < 0.05 * expected.std()


def test_autocast_runs_and_stays_close(tiny_model: MakeModel, tokens: Tokens) -> None:
    model, ids = tiny_model(initializer_range=0.1), tokens(2, 20)
    expected = model(ids).logits
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids).logits
        assert (logits - expected).std() < 0.05 * expected.std()
