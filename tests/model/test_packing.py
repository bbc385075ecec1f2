"""Documents packed in one row by restarting positions do not see each other; gradients are reproducible."""

import pytest
import torch

from keural.model import KeuralMoECausalLM
from tests.helpers.tiny_network import MakeModel, Tokens, decoder_layers

LENGTHS = [11, 3, 14, 1]


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny_model: MakeModel) -> KeuralMoECausalLM:
    return tiny_model(torch.float64, attn_implementation=request.param)


@pytest.fixture
def documents(tokens: Tokens) -> list[torch.Tensor]:
    return [tokens(1, length, seed=length) for length in LENGTHS]


def positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def test_packed_documents_have_the_logits_of_separate_ones(model: KeuralMoECausalLM, documents: list[torch.Tensor]) -> None:
    packed = model(torch.cat(documents, dim=1), position_ids=positions(LENGTHS), use_cache=False).logits
    separate = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, separate)


def test_rows_may_be_packed_differently(model: KeuralMoECausalLM, documents: list[torch.Tensor]) -> None:
    first = torch.cat(documents, dim=1)
    second = torch.cat(documents[::-1], dim=1)
    both = torch.cat((positions(LENGTHS), positions(LENGTHS[::-1])))
    rows = model(torch.cat((first, second)), position_ids=both, use_cache=False).logits
    torch.testing.assert_close(rows[1, -11:], rows[0, :11])
    torch.testing.assert_close(rows[1, :1], rows[0, -1:])


def test_no_gradient_crosses_between_documents(model: KeuralMoECausalLM, documents: list[torch.Tensor]) -> None:
    embeddings = model.get_input_embeddings()(torch.cat(documents, dim=1)).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, position_ids=positions(LENGTHS), use_cache=False).logits
    gradient = torch.autograd.grad(logits[0, 14:28].square().sum(), embeddings)[0][0].abs().sum(-1)
    assert gradient[:14].eq(0).all()
    assert gradient[14:28].gt(0).all()
    assert gradient[28:].eq(0).all()


def gradients(model: KeuralMoECausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_weights_get_the_gradient_of_separate_documents(model: KeuralMoECausalLM, documents: list[torch.Tensor]) -> None:
    ids = torch.cat(documents, dim=1)
    packed = gradients(model, model(ids, position_ids=positions(LENGTHS), use_cache=False).logits.square().sum())
    separate = gradients(model, torch.stack([model(document).logits.square().sum() for document in documents]).sum())
    torch.testing.assert_close(packed, separate)


def test_checkpointed_layers_give_the_same_gradients(model: KeuralMoECausalLM, documents: list[torch.Tensor]) -> None:
    ids = torch.cat(documents, dim=1)

    def loss() -> torch.Tensor:
        output = model(ids, position_ids=positions(LENGTHS), labels=ids, use_cache=False, output_router_logits=True)
        total: torch.Tensor = output.loss
        return total

    plain = gradients(model.train(), loss())
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, loss())
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def test_two_backward_passes_are_bit_identical(tiny_model: MakeModel, tokens: Tokens) -> None:
    model, ids = tiny_model(), tokens(8, 64)
    first, second = (gradients(model, model(ids, labels=ids, output_router_logits=True).loss) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_router_logits_carry_gradients_to_every_router(model: KeuralMoECausalLM, documents: list[torch.Tensor]) -> None:
    output = model(documents[0], output_router_logits=True)
    assert [logits.shape for logits in output.router_logits] == [(11, 5)] * 4
    output.aux_loss.backward()
    gradients_of_routers = [layer.mlp.gate.weight.grad for layer in decoder_layers(model)]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients_of_routers)
