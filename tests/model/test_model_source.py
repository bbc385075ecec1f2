"""Properties of the source that serving engines read: they match text and syntax trees, not behaviour."""

import ast
import inspect

import pytest
import torch

from keural.model import KeuralMoECausalLM, KeuralMoEModel, configuration_keural, modeling_keural


def class_tree(name):
    return ast.parse(inspect.getsource(getattr(modeling_keural, name))).body[0]


def calls(tree, name):
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", getattr(n.func, "attr", "")) == name]


def test_attention_and_experts_can_be_exchanged():
    assert KeuralMoEModel._can_set_attn_implementation()
    assert KeuralMoEModel._can_set_experts_implementation()


def test_the_attention_interface_is_fetched_and_called_once():
    tree = class_tree("KeuralAttention")
    assert len(calls(tree, "get_interface")) == 1
    (call,) = calls(tree, "attention_interface")
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert keywords["scaling"] == "self.scaling"
    assert keywords["sliding_window"] == "self.sliding_window"


def test_attention_modules_know_their_layer_and_window(tiny_model):
    layers = [layer.self_attn for layer in tiny_model().model.layers]
    assert [attention.layer_idx for attention in layers] == [0, 1, 2, 3]
    assert [attention.sliding_window for attention in layers] == [9, None, 9, None]


def test_the_expert_block_returns_one_tensor_and_has_no_other_child(tiny_model):
    block = tiny_model().model.layers[0].mlp
    assert [name for name, _ in block.named_children()] == ["gate", "experts"]
    assert isinstance(block(torch.randn(1, 3, 24)), torch.Tensor)
    assert [name for name, _ in block.gate.named_parameters()] == ["weight"]
    assert {parameter.ndim for parameter in block.experts.parameters()} == {3}


def test_the_router_traces_to_linear_softmax_topk_and_division(tiny_model):
    graph = torch.fx.symbolic_trace(tiny_model().model.layers[0].mlp.gate).graph
    targets = [getattr(node.target, "__name__", node.target) for node in graph.nodes if node.op.startswith("call")]
    assert [t for t in targets if t in ("linear", "softmax", "topk", "sum", "truediv")] == [
        "linear", "softmax", "topk", "sum", "truediv",
    ]  # fmt: skip
    assert "float" not in targets  # it would make an engine run the router in float32


def test_every_class_with_weights_of_its_own_calls_post_init():
    for name in ("KeuralMoEModel", "KeuralMoECausalLM"):
        assert len(calls(class_tree(name), "post_init")) == 1


def test_the_tie_is_a_dictionary():
    assert KeuralMoECausalLM._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("module", [configuration_keural, modeling_keural])
def test_the_files_need_only_torch_transformers_and_each_other(module):
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom):
            assert (node.level == 1 and node.module == "configuration_keural") or node.level == 0, ast.unparse(node)
            root = (node.module or "").split(".")[0]
        elif isinstance(node, ast.Import):
            root = node.names[0].name.split(".")[0]
        else:
            continue
        allowed = {
            "torch",
            "transformers",
            "configuration_keural",
            "__future__",
            "collections",
            "dataclasses",
            "importlib",
            "typing",
        }
        assert root in allowed, ast.unparse(node)
