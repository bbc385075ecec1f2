"""Makes the architecture known to transformers' Auto classes, when somebody comes to use them.

In: nothing. Out: `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know `keural`, whichever of the two packages was imported
first. Importing transformers' network code takes seconds, so that this package does not do it for those who want no network: where
the Auto classes are there already, the architecture is registered at once, else as soon as they have been imported.
"""

import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO_CLASSES = "transformers.models.auto.configuration_auto"
"""Every Auto class, the tokenizers' included, needs this module; nobody can look a model up without it."""
WATCHED = ("transformers", "keural.model")
"""Modules that import each other while they are read; the architecture is registered when none of them is half read."""


def register_when_needed() -> None:
    """Register the architecture now if transformers' Auto classes are there, else right after they have been imported."""
    if AUTO_CLASSES in sys.modules:
        register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def register() -> None:
    """Make the architecture known to the Auto classes; a second time changes nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from keural.model.configuration_keural import KeuralConfig
    from keural.model.modeling_keural import KeuralMoECausalLM, KeuralMoEModel

    AutoConfig.register(KeuralConfig.model_type, KeuralConfig, exist_ok=True)
    AutoModel.register(KeuralConfig, KeuralMoEModel, exist_ok=True)
    AutoModelForCausalLM.register(KeuralConfig, KeuralMoECausalLM, exist_ok=True)


class _Watch:
    """A meta path finder: finds watched modules as they are found without it, registers when the outermost of them has been read.

    Not sooner: transformers' base classes import the Auto classes in the middle of their own files, where our network, which is
    built on them, cannot be imported yet.
    """

    def __init__(self) -> None:
        self._being_read = threading.local()

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not any(fullname == name or fullname.startswith(f"{name}.") for name in WATCHED):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        loader: Any = spec.loader if spec is not None else None
        if loader is None or not hasattr(loader, "exec_module"):
            return spec
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            depth = getattr(self._being_read, "depth", 0)
            self._being_read.depth = depth + 1
            try:
                execute(module)
            finally:
                self._being_read.depth = depth
            if depth == 0:
                self._register_once()

        loader.exec_module = execute_and_register
        return spec

    def _register_once(self) -> None:
        if AUTO_CLASSES in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()
