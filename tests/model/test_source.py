"""Properties of the source that transformers reads: it matches text and syntax trees, not behaviour."""

import ast
import inspect
import types

import pytest

from keural.model import KeuralMoECausalLM, KeuralMoEModel, configuration_keural, modeling_keural
from tests.helpers.tiny_network import MakeModel, decoder_layers


def class_tree(name: str) -> ast.stmt:
    return ast.parse(inspect.getsource(getattr(modeling_keural, name))).body[0]


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", getattr(n.func, "attr", "")) == name]


def test_attention_and_experts_can_be_exchanged() -> None:
    assert KeuralMoEModel._can_set_attn_implementation()
    assert KeuralMoEModel._can_set_experts_implementation()


def test_attention_receives_the_window_of_its_layer(tiny_model: MakeModel) -> None:
    assert [layer.self_attn.sliding_window for layer in decoder_layers(tiny_model())] == [9, None, 9, None]
    (call,) = calls(class_tree("KeuralAttention"), "attention_interface")
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}["sliding_window"] == "self.sliding_window"


def test_every_class_with_weights_of_its_own_calls_post_init() -> None:
    for name in ("KeuralMoEModel", "KeuralMoECausalLM"):
        assert len(calls(class_tree(name), "post_init")) == 1


def test_the_tie_is_a_dictionary() -> None:
    assert KeuralMoECausalLM._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("module", [configuration_keural, modeling_keural])
def test_the_files_need_only_torch_transformers_and_each_other(module: types.ModuleType) -> None:
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
            "inspect",
            "typing",
        }
        assert root in allowed, ast.unparse(node)
