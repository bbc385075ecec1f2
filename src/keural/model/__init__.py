"""The architecture: configuration and network. `keural.registration` makes them known to transformers' Auto classes.

Nothing of the rest of the package is imported here; the two files beside this one also travel with exported weights. Each name is
imported when it is first asked for, so that what only counts weights need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_keural import KeuralConfig
    from .modeling_keural import KeuralMoECausalLM, KeuralMoEModel, KeuralPreTrainedModel, router_losses
    from .parameters import CHATML_IDS, SHAPE, ParameterCount, count_parameters
    from .vocabulary import grow_vocabulary, mean_row, with_mean_rows

__all__ = [
    "CHATML_IDS",
    "SHAPE",
    "KeuralConfig",
    "KeuralMoECausalLM",
    "KeuralMoEModel",
    "KeuralPreTrainedModel",
    "ParameterCount",
    "count_parameters",
    "grow_vocabulary",
    "mean_row",
    "router_losses",
    "with_mean_rows",
]

_HOME = {
    "KeuralConfig": "configuration_keural",
    "KeuralMoECausalLM": "modeling_keural",
    "KeuralMoEModel": "modeling_keural",
    "KeuralPreTrainedModel": "modeling_keural",
    "router_losses": "modeling_keural",
    "ParameterCount": "parameters",
    "count_parameters": "parameters",
    "CHATML_IDS": "parameters",
    "SHAPE": "parameters",
    "grow_vocabulary": "vocabulary",
    "mean_row": "vocabulary",
    "with_mean_rows": "vocabulary",
}
"""The module of each name."""


def __getattr__(name: str) -> Any:
    """The names above, each from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
