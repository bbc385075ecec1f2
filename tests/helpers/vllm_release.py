"""The matchers of vLLM's transformers backend out of an unpacked release, without the rest of vLLM.

In: the `vllm` directory of a release. Out: what the backend would fuse in a network. Nothing is installed and no GPU is needed:
every module that the matchers import from elsewhere in vLLM is replaced by an empty stand-in.
"""

import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from torch import nn
from transformers.modeling_utils import PreTrainedModel

Findings = dict[str, Any]

BACKEND = "vllm.model_executor.models.transformers"
REAL = ("fuser", "fusers", "fx_utils", "utils")
STAND_INS: dict[str, Any] = {
    "init_logger": lambda name: MagicMock(),
    "cached": lambda **settings: lambda function: function,  # each variant of a class is analysed anew
    "_ACTIVATION_AND_MUL_REGISTRY": {},
}


class StandIn(types.ModuleType):
    """A module in which every name is an empty layer."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return STAND_INS[name] if name in STAND_INS else type(name, (nn.Module,), {})


class MatchersOnly(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the backend's matchers in an unpacked release, and stand-ins for whatever else of vLLM they import."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in ("vllm", "cachetools"):
            return None
        if name.removeprefix(BACKEND + ".").split(".")[0] not in REAL:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        file = self.source.joinpath(*name.split(".")[1:])
        if file.is_dir():
            return importlib.util.spec_from_file_location(name, file / "__init__.py", submodule_search_locations=[str(file)])
        return importlib.util.spec_from_file_location(name, file.with_suffix(".py"))

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """A stand-in has nothing to run."""


def load_matchers(source: Path) -> Callable[[PreTrainedModel], Findings]:
    """A function that says what the matchers of the release in `source` find: how experts are routed, and which fusions apply."""
    sys.meta_path.insert(0, MatchersOnly(source))
    get_fusers = importlib.import_module(f"{BACKEND}.fuser").get_fusers
    moe = importlib.import_module(f"{BACKEND}.fusers.moe").MoEBlockFuser

    def find(model: PreTrainedModel) -> Findings:
        layer = model.layers[1]
        block = moe.match(layer.mlp, "experts")
        attention = {type(fuser).__name__: fuser for fuser in get_fusers(layer.self_attn)}
        projections, dispatch = attention.get("QKVFuser"), attention.get("AttentionFuser")
        return {
            "routing": block and (block.scoring_func, block.renormalize, block.router_dtype, block.shared_name),
            "first choice": next(iter(attention), None),  # the others stand by for modules that it cannot take
            "output": projections and projections.o_name,
            "layer": dispatch and dispatch.layer_index(layer.self_attn),
            "scale": dispatch and dispatch.scale_expr and ast.unparse(dispatch.scale_expr),
            "norms": [(fuser.zero_centered, fuser.eps_attr) for fuser in get_fusers(model.norm)],
        }

    return find
