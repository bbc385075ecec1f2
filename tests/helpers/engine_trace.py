"""How an engine looks at a module: a trace in which children are single calls, and the syntax tree of its forward.

In: a module. Out: a torch.fx graph and questions about its nodes. Follows `fx_utils.py` of vLLM's transformers backend.
"""

import ast
import inspect
import operator
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import fx, nn


class LeadingShape(fx.Proxy):
    """`x.shape[:-1]` of hidden states ``[B, T, H]``, which can be unpacked."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[fx.Proxy]:
        return iter([self.tracer.create_proxy("call_function", operator.getitem, (self, index), {}) for index in (0, 1)])


class EngineTracer(fx.Tracer):
    """Records what a module does itself: each child is one call, and so is the attention function."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def keys(self, obj: fx.Proxy) -> Any:
        """Engines pass no further keyword arguments on."""
        return iter(())

    def proxy(self, node: fx.Node) -> fx.Proxy:
        source = node.args[0] if node.target is operator.getitem else None
        of_shape = isinstance(source, fx.Node) and source.target is getattr and source.args[1] == "shape"
        return LeadingShape(node, self) if of_shape else super().proxy(node)


def trace(module: nn.Module) -> fx.Graph:
    """The graph of a module's forward without a cache; fails where an engine's trace would be cut short."""
    without_cache = {"past_key_values": None} if "past_key_values" in inspect.signature(module.forward).parameters else None
    try:
        return EngineTracer().trace(module, concrete_args=without_cache)
    except (fx.proxy.TraceError, RuntimeError) as error:
        raise AssertionError(f"the trace of {type(module).__name__} is cut short") from error


def function_name(node: object) -> str:
    """`linear`, `softmax`, ... for a call of a function or a method; empty for anything else."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    return str(getattr(node.target, "__name__", node.target))


def functions(graph: fx.Graph) -> list[str]:
    return [function_name(node) for node in graph.nodes if function_name(node)]


def bare(node: Any) -> Any:
    """The value below reshapes and casts of precision."""
    while function_name(node) in ("reshape", "view", "to", "float", "type_as"):
        node = node.args[0]
    return node


def module_calls(graph: fx.Graph) -> dict[str, fx.Node]:
    """The calls of children by name, each child called once."""
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    assert len({node.target for node in nodes}) == len(nodes)
    return {node.target: node for node in nodes}


def result(graph: fx.Graph) -> Any:
    """What a traced forward returns."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    return output.args[0]


def the_input(graph: fx.Graph) -> fx.Node:
    node: fx.Node = next(node for node in graph.nodes if node.op == "placeholder")
    return node


def forward_tree(module: nn.Module) -> ast.FunctionDef:
    """The syntax tree of a module's forward, as `inspect` finds it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward)))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


def calls_of(tree: ast.AST, name: str) -> list[ast.Call]:
    """Calls of the variable `name`, or of `self.name`."""
    spelled = (name, f"self.{name}")
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in spelled]
