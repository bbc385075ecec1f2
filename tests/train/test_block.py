"""The training block is the model's layer and Mixtral's, whatever it keeps, and waits for nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, MixtralForCausalLM

from keural.model import KeuralMoECausalLM
from keural.train.network.attention import ATTENTION, choose_attention, packing
from keural.train.network.block import network_of, settings_of, windows_of
from keural.train.network.experts import GROUPED, mixture, sort_by_expert
from keural.train.network.layers import COMPILED, forward, graphs
from keural.train.network.recompute import RECOMPUTE
from tests.helpers.train_small import LENGTH, VOCAB, random_model

CPU = torch.device("cpu")
POSITIONS = torch.stack([torch.cat([torch.arange(10), torch.arange(LENGTH - 10)]), torch.arange(LENGTH)])


def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def ours(
    model: KeuralMoECausalLM,
    recompute: str = "none",
    experts: str = "loop",
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    modes = [recompute] * model.config.num_hidden_layers
    settings = settings_of(model.config, "masked", experts)
    packed = packing(POSITIONS, CPU)
    return forward(network_of(model), ids().flatten(), packed, windows_of(model.config), settings, dtype, modes, compiled)


def gradients(model: torch.nn.Module, hidden: torch.Tensor, logits: Any) -> dict[str, torch.Tensor]:
    """Of a loss that reads the hidden states and the routers' logits."""
    model.zero_grad()
    weights = torch.randn(hidden.numel(), generator=torch.Generator().manual_seed(4)).view_as(hidden)
    ((hidden * weights).sum() + 0.1 * sum(layer.square().sum() for layer in logits)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("experts", list(GROUPED))
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_block_equals_the_models_layer_forward_and_backward(recompute: str, experts: str) -> None:
    model = random_model(scale=6.0)
    expected = model.model(input_ids=ids(), position_ids=POSITIONS, use_cache=False, output_router_logits=True)
    hidden, logits = ours(model, recompute, experts)
    torch.testing.assert_close(hidden.view_as(expected.last_hidden_state), expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected.router_logits), atol=1e-5, rtol=1e-5)
    theirs = gradients(model, expected.last_hidden_state.flatten(0, 1), expected.router_logits)
    found = gradients(model, *ours(model, recompute, experts))
    assert found.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


def test_block_equals_mixtral_forward_and_backward() -> None:
    model = random_model(scale=6.0, layer_types=["full_attention"] * 2)
    c = model.config
    shape = {name: getattr(c, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "rms_norm_eps",
        "max_position_embeddings", "rope_parameters", "tie_word_embeddings")}  # fmt: skip
    mixtral = MixtralForCausalLM(MixtralConfig(**shape, sliding_window=None, router_jitter_noise=0.0)).train()
    mixtral.load_state_dict(model.state_dict())
    theirs = mixtral.model(
        input_ids=ids(), position_ids=torch.arange(LENGTH).expand(2, -1), use_cache=False, output_router_logits=True
    )
    packed = packing(torch.arange(LENGTH).expand(2, -1), CPU)
    hidden, _ = forward(
        network_of(model), ids().flatten(), packed, windows_of(c), settings_of(c, "masked", "loop"), torch.float32, ["none"] * 2
    )
    torch.testing.assert_close(hidden.view_as(theirs.last_hidden_state), theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
    expected = gradients(mixtral, theirs.last_hidden_state.flatten(0, 1), ())
    found = gradients(model, hidden, ())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


def in_bfloat16(model: KeuralMoECausalLM) -> KeuralMoECausalLM:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "gate.weight" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_block_compiles_as_one_graph(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPILED, recompute, graphs("aot_eager")[recompute])
    model = in_bfloat16(random_model(scale=6.0))
    plain = gradients(model, *ours(model, recompute, "grouped_mm", dtype=torch.bfloat16))
    compiled = gradients(model, *ours(model, recompute, "grouped_mm", compiled=True, dtype=torch.bfloat16))
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, atol=0.05 * float(gradient.abs().max()), rtol=0)


class Audit(TorchDispatchMode):
    """What a step calls that waits for the device, and the dtypes and number of its products."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "bincount", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.accumulating: list[str] = []
        self.products: list[torch.dtype] = []
        self.sorts = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in self.WAITS:
            self.waits.append(name)
        if name.startswith(("index_put", "index_add", "scatter_add", "scatter_reduce")):
            self.accumulating.append(name)
        if name == "_grouped_mm":
            self.products.append(args[0].dtype)
        self.sorts += name == "sort"
        return function(*args, **(kwargs or {}))


def audited(step: Callable[[], Any]) -> Audit:
    step()
    with Audit() as audit:
        step()
    return audit


@pytest.mark.parametrize(("recompute", "products", "sorts"), [("none", 6, 1), ("selective", 6, 1), ("full", 8, 2)])
def test_a_bfloat16_step_waits_for_nothing_and_multiplies_in_bfloat16(recompute: str, products: int, sorts: int) -> None:
    model = in_bfloat16(random_model(scale=6.0))
    packed = packing(POSITIONS, CPU)
    tokens = ids().flatten()

    def step() -> None:
        settings, windows = settings_of(model.config), windows_of(model.config)
        hidden, logits = forward(network_of(model), tokens, packed, windows, settings, torch.bfloat16, [recompute] * 2)
        (hidden.float().sum() + torch.stack(logits).sum()).backward()

    audit = audited(step)
    assert audit.waits == []
    assert audit.accumulating == []
    assert audit.products == [torch.bfloat16] * products * 2
    assert audit.sorts == sorts * 2, "selective keeps the router's choice"


def test_the_audit_sees_what_waits_and_what_accumulates() -> None:
    seen = audited(lambda: torch.zeros(3).index_put((torch.tensor([0, 0]),), torch.ones(2), accumulate=True).nonzero())
    assert seen.accumulating
    assert seen.waits


def test_experts_without_tokens_get_zero_gradients() -> None:
    for name in GROUPED:
        gate_up, down = torch.randn(4, 16, 16, requires_grad=True), torch.randn(4, 16, 8, requires_grad=True)
        experts = torch.tensor([[0, 2]]).expand(6, 2)
        mixture(torch.randn(6, 16), torch.full((6, 2), 0.5), experts, gate_up, down, name).sum().backward()
        for weight in (gate_up, down):
            assert weight.grad is not None
            assert not weight.grad[[1, 3]].any()
            assert weight.grad[[0, 2]].any()


def test_mixture_gradcheck_in_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens, gate_up, down = (
        torch.randn(*s, generator=draw, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (3, 6, 4), (3, 4, 3))
    )
    experts = torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0], [2, 1]])
    weights = torch.rand(5, 2, generator=draw, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, w, g, d: mixture(t, w, experts, g, d, "loop"), (tokens, weights, gate_up, down))


def test_places_are_the_inverse_of_the_order() -> None:
    experts = torch.randint(0, 5, (40, 2), generator=torch.Generator().manual_seed(1))
    routing = sort_by_expert(experts, 6)
    assert torch.equal(routing.order[routing.places], torch.arange(80))
    assert torch.equal(experts.flatten()[routing.order], experts.flatten().sort().values)
    assert routing.offsets.tolist() == [int((experts < number).sum()) for number in range(1, 7)]


def test_a_document_begins_where_a_position_does_not_follow() -> None:
    packed = packing(torch.tensor([[0, 1, 2, 0, 1], [5, 6, 0, 0, 1]]), CPU)
    assert packed.offsets.tolist() == [0, 3, 5, 7, 8, 10]
    assert packed.documents.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("window", [None, 3])
def test_flex_equals_the_twin(window: int | None) -> None:
    draw = torch.Generator().manual_seed(0)
    packed = packing(POSITIONS, CPU)
    query, key, value = (torch.randn(2 * LENGTH, heads, 16, generator=draw) for heads in (4, 2, 2))
    results = [ATTENTION[name].attend(query, key, value, ATTENTION[name].prepare(packed, window)) for name in ("flex", "masked")]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_a_cpu_needs_no_kernel_and_gets_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert choose_attention(CPU, torch.bfloat16) == "documents"
    assert not recwarn.list
