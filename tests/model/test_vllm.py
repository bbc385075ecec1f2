"""What vLLM's transformers backend needs of the network, checked on the source and on a trace of it, without vLLM.

The backend (vLLM 0.33, `model_executor/models/transformers/`) builds the base model, matches its modules against patterns and puts
fused layers in their place; what does not match still runs, but slower. Each property below names the file that looks for it. Each
entry of `BREAKS` is a change of the modelling file that costs a property, and the tests show that it is noticed.

With KEURAL_VLLM_SOURCE set to the `vllm` directory of an unpacked release, the backend's own matchers run on the network and on
every broken variant too (`tests/helpers/vllm_release.py`).
"""

import ast
import importlib
import inspect
import operator
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import fx, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

import keural.model
from keural.model import KeuralMoEModel
from tests.helpers.engine_trace import (
    bare,
    calls_of,
    forward_tree,
    function_name,
    functions,
    module_calls,
    result,
    the_input,
    trace,
)
from tests.helpers.shapes import TINY
from tests.helpers.tiny_network import decoder_layers
from tests.helpers.vllm_release import Findings, load_matchers

ENGINE = "an_engines_own"
"""Name under which the attention of an engine is registered with transformers here, as vLLM registers "vllm"."""
LENGTHS = (23, 14)
"""Lengths of the sequences that the engine of these tests runs as one row."""


def attend_to_one_row(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Any, None]:
    """The attention of an engine: `LENGTHS` sequences in one row, its own window and scale, output ``[T, heads · D]``."""
    if isinstance(query, fx.Proxy):
        return query.tracer.create_proxy("call_function", attend_to_one_row, (query, key, value), {}), None
    assert attention_mask is None, "an engine keeps its own account of what is visible"
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    sequence, position = torch.tensor([(row, at) for row, length in enumerate(LENGTHS) for at in range(length)]).unbind(1)
    distance = position[:, None] - position[None, :]
    window = module.engine.window or query.shape[2]
    visible = (sequence[:, None] == sequence[None, :]) & (distance >= 0) & (distance < window)
    weights = (query @ key.transpose(2, 3) * module.engine.scale).masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)[0], None


ALL_ATTENTION_FUNCTIONS.register(ENGINE, attend_to_one_row)


def block_is_gate_then_experts(model: PreTrainedModel) -> None:
    """`_, weights, ids = gate(x)`, then one tensor `experts(x, ids, weights)`, up to reshapes. (fusers/moe.py, `MoEBlockFuser`)"""
    block = model.layers[0].mlp
    graph = trace(block)
    x, calls = the_input(graph), module_calls(graph)
    assert list(calls) == ["gate", "experts"]
    experts, gate = calls["experts"], calls["gate"]
    assert bare(result(graph)) is experts
    tokens, ids, weights = (bare(argument) for argument in experts.args)
    assert tokens is x
    assert bare(gate.args[0]) is x
    assert (ids.target, ids.args) == (operator.getitem, (gate, 2))
    assert (weights.target, weights.args) == (operator.getitem, (gate, 1))


def block_has_no_other_state(model: PreTrainedModel) -> None:
    """A third child with weights would be dropped with the block's forward, so vLLM leaves such a block alone. (fusers/moe.py)"""
    block = model.layers[0].mlp
    stateful = {name for name, child in block.named_children() if child.state_dict()}
    assert stateful == {"gate", "experts"}
    assert not block._parameters
    assert not block._buffers


def router_is_linear_softmax_topk_normalised(model: PreTrainedModel) -> None:
    """topk(softmax(linear(x))) over one matrix, the weights divided by their sum. (fusers/moe.py, `_match_router`)"""
    gate = model.layers[0].mlp.gate
    assert [(name, parameter.ndim) for name, parameter in gate.named_parameters()] == [("weight", 2)]
    assert not list(gate.buffers())
    graph = trace(gate)
    nodes = {function_name(node): node for node in graph.nodes}
    order = [name for name in functions(graph) if name in ("linear", "softmax", "topk", "sum", "truediv")]
    assert order == ["linear", "softmax", "topk", "sum", "truediv"]
    weights, total = nodes["truediv"].args
    assert function_name(total) == "sum"
    assert total.args[0] is weights
    assert weights.args == (nodes["topk"], 0)
    logits, chosen_weights, chosen = result(graph)
    assert logits is nodes["linear"]
    assert bare(chosen_weights) is nodes["truediv"]
    assert chosen.args == (nodes["topk"], 1)


def router_keeps_the_models_precision(model: PreTrainedModel) -> None:
    """A cast before the softmax would make vLLM run the router in that precision. (fusers/moe.py, `_forced_dtype`)"""
    graph = trace(model.layers[0].mlp.gate)
    upstream = functions(graph)[: functions(graph).index("softmax")]
    assert not {"float", "to", "type", "double"} & set(upstream)


def experts_are_three_dimensional(model: PreTrainedModel) -> None:
    """A child named `experts` with 3-D parameters only, not transposed and without biases. (moe.py, `recursive_replace`)"""
    experts = model.layers[0].mlp.experts
    assert {name: parameter.ndim for name, parameter in experts.named_parameters()} == {"gate_up_proj": 3, "down_proj": 3}
    assert not getattr(experts, "is_transposed", False)
    assert list(inspect.signature(experts.forward).parameters) == ["hidden_states", "top_k_index", "top_k_weights"]


def attention_is_called_once(model: PreTrainedModel) -> None:
    """One call of one function taken from ALL_ATTENTION_FUNCTIONS by name. (fusers/attention.py, `interface_call`)"""
    tree = forward_tree(model.layers[0].self_attn)
    fetched = [
        ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and node.value is not None
        and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS")
    ]
    assert len(fetched) == 1
    assert len(calls_of(tree, fetched[0])) == 1


def attention_scale_is_an_attribute(model: PreTrainedModel) -> None:
    """`scaling=` is `self.<number>`, and no sinks are passed. (fusers/attention.py, `_resolve`)"""
    attention = model.layers[0].self_attn
    keywords = {
        keyword.arg: ast.unparse(keyword.value)
        for call in calls_of(forward_tree(attention), "attention_interface")
        for keyword in call.keywords
    }
    match = re.fullmatch(r"self\.(\w+)", keywords["scaling"])
    assert match is not None
    assert getattr(attention, match[1]) == TINY["head_dim"] ** -0.5
    assert "s_aux" not in keywords


def attention_knows_its_layer(model: PreTrainedModel) -> None:
    """`layer_idx` is the layer's number, each once; no module says it is not causal. (base.py, `_create_attention_instances`)"""
    assert [getattr(layer.self_attn, "layer_idx", None) for layer in model.layers] == list(range(TINY["num_hidden_layers"]))
    assert all(getattr(module, "is_causal", True) for module in model.modules())


def projections_read_one_input(model: PreTrainedModel) -> None:
    """q(x), k(x), v(x) on the module's input, each called once, and o last in a whole trace. (fusers/qkv.py, fx_utils.py)"""
    attention = model.layers[0].self_attn
    graph = trace(attention)
    x, calls = the_input(graph), module_calls(graph)
    assert list(calls) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert all(calls[name].args == (x,) and not calls[name].kwargs for name in ("q_proj", "k_proj", "v_proj"))
    assert result(graph)[0] is calls["o_proj"]
    assert attention.q_proj.out_features > attention.k_proj.out_features == attention.v_proj.out_features
    assert attention.o_proj.in_features == attention.q_proj.out_features
    tree = forward_tree(attention)
    assert all(ast.unparse(tree).count(f"self.{name}") == 1 for name in calls)
    assert "hidden_states" not in {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def norm_is_a_pure_rms_norm(model: PreTrainedModel) -> None:
    """weight · x · rsqrt(mean(x²) + eps) with eps in an attribute, and nothing after it. (fusers/rms_norm.py)"""
    norm = model.norm
    graph = trace(norm)
    x = the_input(graph)
    nodes = {function_name(node): node for node in graph.nodes}
    squared, epsilon = nodes["mean"].args[0], nodes["add"].args[1]
    assert (function_name(squared), bare(squared.args[0]), squared.args[1]) == ("pow", x, 2)
    assert nodes["add"].args[0] is nodes["mean"]
    assert nodes["rsqrt"].args == (nodes["add"],)
    assert [name for name, value in vars(norm).items() if value == epsilon] == ["variance_epsilon"]
    weight, normalised = result(graph).args
    assert (function_name(result(graph)), weight.op, weight.target) == ("mul", "get_attr", "weight")
    assert [bare(factor) for factor in bare(normalised).args] == [x, nodes["rsqrt"]]


Property = Callable[[PreTrainedModel], None]
PROPERTIES: tuple[Property, ...] = (
    block_is_gate_then_experts,
    block_has_no_other_state,
    router_is_linear_softmax_topk_normalised,
    router_keeps_the_models_precision,
    experts_are_three_dimensional,
    attention_is_called_once,
    attention_scale_is_an_attribute,
    attention_knows_its_layer,
    projections_read_one_input,
    norm_is_a_pure_rms_norm,
)


class Break(NamedTuple):
    """A change of the modelling file and the property that it costs."""

    old: str
    new: str
    costs: Property


GATE = "        _, top_k_weights, top_k_index = self.gate(hidden_states)\n"
NORMALISE = "        top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)\n"
LOGITS = "F.linear(hidden_states, self.weight)"
ATTEND = "        attention_output, attention_weights = attention_interface(\n"
EXPERTS = "        self.experts = KeuralExperts(config)\n"

BREAKS: dict[str, Break] = {
    "the block returns a tuple": Break(
        "        return hidden_states.reshape(shape)\n",
        "        return hidden_states.reshape(shape), top_k_weights\n",
        block_is_gate_then_experts,
    ),
    "the block routes by itself": Break(
        GATE,
        "        probabilities = F.linear(hidden_states, self.gate.weight).softmax(-1)\n"
        "        top_k_weights, top_k_index = probabilities.topk(2)\n",
        block_is_gate_then_experts,
    ),
    "experts are called in another order": Break(
        "self.experts(hidden_states, top_k_index, top_k_weights)",
        "self.experts(hidden_states, top_k_weights, top_k_index)",
        block_is_gate_then_experts,
    ),
    "experts see another input": Break(
        GATE, GATE + "        hidden_states = hidden_states * 2\n", block_is_gate_then_experts
    ),
    "the block has a third child": Break(
        EXPERTS, EXPERTS + "        self.extra = nn.Linear(config.hidden_size, 1)\n", block_has_no_other_state
    ),
    "weights are not renormalised": Break(NORMALISE, "", router_is_linear_softmax_topk_normalised),
    "the router has a bias": Break(
        "        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))\n",
        "        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))\n"
        "        self.bias = nn.Parameter(torch.empty(self.num_experts))\n",
        router_is_linear_softmax_topk_normalised,
    ),
    "the router uses sigmoid": Break(
        "F.softmax(router_logits, dim=-1, dtype=torch.float32)", "router_logits.sigmoid()", router_is_linear_softmax_topk_normalised
    ),
    "router logits are cast": Break(LOGITS, LOGITS + ".float()", router_keeps_the_models_precision),
    "experts have biases": Break(
        "        self.act_fn = ACT2FN",
        "        self.bias = nn.Parameter(torch.empty(self.num_experts, 1))\n        self.act_fn = ACT2FN",
        experts_are_three_dimensional,
    ),
    "attention is called twice": Break(
        ATTEND, "        attention_interface(self, query_states, key_states, value_states, None, scaling=1.0)\n" + ATTEND,
        attention_is_called_once,
    ),
    "the scale is an expression": Break("scaling=self.scaling", "scaling=self.head_dim**-0.5", attention_scale_is_an_attribute),
    "the layer's number is kept elsewhere": Break("self.layer_idx", "self.number", attention_knows_its_layer),
    "keys read another input": Break("self.k_proj(hidden_states)", "self.k_proj(2 * hidden_states)", projections_read_one_input),
    "a trace ends at unpacked arguments": Break(
        "rotate(query_states, cosines, sines)", "rotate(query_states, *position_embeddings)", projections_read_one_input
    ),
    "something follows the norm": Break(
        "        return self.weight * hidden_states.to(dtype)\n",
        "        return self.weight * hidden_states.to(dtype) * 1.5\n",
        norm_is_a_pure_rms_norm,
    ),
    "the norm subtracts the mean": Break(
        "hidden_states.pow(2).mean(-1",
        "(hidden_states - hidden_states.mean(-1, keepdim=True)).pow(2).mean(-1",
        norm_is_a_pure_rms_norm,
    ),
}  # fmt: skip


@pytest.fixture
def base_model() -> KeuralMoEModel:
    """The network as an engine builds it: the base model alone, with the engine's attention."""
    model = build(keural.model)
    assert isinstance(model, KeuralMoEModel)
    return model


@pytest.fixture
def broken_model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """The network with one of `BREAKS` applied to its source."""
    change = BREAKS[request.param]
    package = tmp_path / "broken"
    package.mkdir()
    for name in ("configuration_keural.py", "modeling_keural.py"):
        source = (Path(keural.model.__path__[0]) / name).read_text(encoding="utf-8")
        (package / name).write_text(source.replace(change.old, change.new), encoding="utf-8")
        changed = source.count(change.old)
    assert changed, f"the modelling file has no {change.old!r} any more"
    (package / "__init__.py").write_text(
        "from .configuration_keural import KeuralConfig\nfrom .modeling_keural import KeuralMoEModel\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "broken"]:
        monkeypatch.delitem(sys.modules, name)
    return build(importlib.import_module("broken"))


def build(module: types.ModuleType) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = module.KeuralMoEModel(module.KeuralConfig(**TINY, initializer_range=0.3)).eval()
    model.config._attn_implementation = ENGINE
    return model


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda prop: prop.__name__)
def test_the_network_has_what_the_backend_matches(base_model: KeuralMoEModel, holds: Property) -> None:
    holds(base_model)


@pytest.mark.parametrize("broken_model", BREAKS, indirect=True)
def test_losing_a_property_is_noticed(broken_model: PreTrainedModel, request: pytest.FixtureRequest) -> None:
    costs = BREAKS[request.node.callspec.params["broken_model"]].costs
    with pytest.raises(AssertionError):
        costs(broken_model)


@torch.no_grad()
def test_an_engines_attention_over_a_flat_row_gives_the_same_hidden_states(base_model: KeuralMoEModel) -> None:
    """Called as in base.py, `forward`: one row of several sequences, no mask, no cache; windows from `layer_types` and
    `sliding_window` of the configuration, scale from the module."""
    config = base_model.config
    for layer, layer_type in zip(decoder_layers(base_model), config.layer_types, strict=True):
        attention: Any = layer.self_attn
        window = config.sliding_window if layer_type == "sliding_attention" else None
        attention.engine = SimpleNamespace(window=window, scale=attention.scaling)
    sequences = [torch.randint(0, TINY["vocab_size"], (1, length)) for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)

    row = base_model(
        input_ids=torch.cat(sequences, dim=1), inputs_embeds=None, use_cache=False, position_ids=positions, return_dict=False
    )

    config._attn_implementation = "eager"
    expected = [base_model(sequence).last_hidden_state for sequence in sequences]
    assert isinstance(row, tuple)
    torch.testing.assert_close(row[0], torch.cat(expected, dim=1), atol=1e-5, rtol=1e-4)


def test_the_backend_finds_its_numbers_in_the_configuration(base_model: KeuralMoEModel) -> None:
    """(moe.py, `recursive_replace`; transformers_utils/config.py, `CONFIG_FIELD_ALIASES`; model_arch_config_convertor.py)"""
    config = base_model.config
    assert config.get_text_config() is config
    assert (config.num_experts, config.num_experts_per_tok) == (5, 2)
    assert not hasattr(config, "moe_intermediate_size")  # would be read before intermediate_size
    assert (config.intermediate_size, config.hidden_size, config.head_dim, config.num_key_value_heads) == (20, 24, 8, 2)
    assert config.hidden_act == "silu"  # assumed, not read
    absent = ("norm_topk_prob", "routed_scaling_factor", "n_group", "moe_router_dtype", "logit_scale", "final_logit_softcapping")
    assert not [name for name in absent if getattr(config, name, None) is not None]


def test_the_backend_may_choose_the_attention(base_model: KeuralMoEModel) -> None:
    """(registry.py, `_try_resolve_transformers`)"""
    assert base_model.is_backend_compatible()
    assert base_model._can_set_attn_implementation()


def test_everything_but_the_tied_head_is_in_the_base_model(base_model: KeuralMoEModel) -> None:
    """vLLM builds the base model and ties a head of its own to its embedding. (causal.py)"""
    whole = keural.model.KeuralMoECausalLM(base_model.config)
    assert {name for name, _ in whole.named_parameters(remove_duplicate=False)} == {
        "lm_head.weight", *(f"model.{name}" for name, _ in base_model.named_parameters()),
    }  # fmt: skip
    assert base_model.config.tie_word_embeddings
    assert base_model.get_input_embeddings() is base_model.embed_tokens
    assert base_model.get_decoder() is base_model


def test_the_tensor_parallel_plan_places_every_projection(base_model: KeuralMoEModel) -> None:
    """(base.py, `recursive_replace`; utils.py, `replace_linear_class`)"""
    plan = {
        name: next(style for pattern, style in base_model.tp_plan.items() if re.match(pattern, name))
        for name, module in base_model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.1.")
    }
    assert plan == {
        "layers.1.self_attn.q_proj": "colwise",
        "layers.1.self_attn.k_proj": "colwise",
        "layers.1.self_attn.v_proj": "colwise",
        "layers.1.self_attn.o_proj": "rowwise",
    }


def test_the_pipeline_plan_names_the_children_with_weights_in_order(base_model: KeuralMoEModel) -> None:
    """(base.py, `pipeline_parallel`)"""
    assert list(base_model._pp_plan) == [name for name, child in base_model.named_children() if list(child.parameters())]


MATCHED = {
    "routing": ("softmax", True, None, None),
    "first choice": "QKVFuser",
    "output": "o_proj",
    "layer": 1,
    "scale": "self.scaling",
    "norms": [(False, "variance_epsilon")],
}
UNMATCHED_ELSEWHERE = {"experts have biases"}
"""Read by `recursive_replace` of moe.py, which needs all of vLLM to run."""


@pytest.fixture(scope="module")
def findings() -> Iterator[Callable[[PreTrainedModel], Findings]]:
    """What vLLM's own matchers find in a network."""
    if "KEURAL_VLLM_SOURCE" not in os.environ:
        pytest.skip("KEURAL_VLLM_SOURCE does not name the vllm directory of an unpacked release")
    finders, modules = list(sys.meta_path), set(sys.modules)
    yield load_matchers(Path(os.environ["KEURAL_VLLM_SOURCE"]))
    sys.meta_path[:] = finders
    for name in set(sys.modules) - modules:
        if name.split(".")[0] in ("vllm", "cachetools"):
            del sys.modules[name]


def test_vllms_matchers_fuse_experts_projections_and_norms(
    findings: Callable[[PreTrainedModel], Findings], base_model: KeuralMoEModel
) -> None:
    assert findings(base_model) == MATCHED


@pytest.mark.parametrize("broken_model", [name for name in BREAKS if name not in UNMATCHED_ELSEWHERE], indirect=True)
def test_vllms_matchers_miss_something_in_every_broken_variant(
    findings: Callable[[PreTrainedModel], Findings], broken_model: PreTrainedModel
) -> None:
    assert findings(broken_model) != MATCHED
