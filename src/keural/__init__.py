"""Keural: a Korean-English mixture-of-experts language model, from raw text to a chat.

Importing the package registers the architecture with transformers, so that `AutoModelForCausalLM.from_pretrained(DIR)` works,
whichever of the two is imported first. The network itself is imported when it is first used: the package alone is there at once.
"""

from typing import TYPE_CHECKING, Any

from keural.errors import UserError
from keural.registration import register_when_needed

if TYPE_CHECKING:
    from keural.model import KeuralConfig, KeuralMoECausalLM, KeuralMoEModel

__version__ = "0.1.0"
__all__ = ["KeuralConfig", "KeuralMoECausalLM", "KeuralMoEModel", "UserError", "__version__"]

register_when_needed()


def __getattr__(name: str) -> Any:
    """The network's classes, imported when they are first asked for."""
    if name in {"KeuralConfig", "KeuralMoECausalLM", "KeuralMoEModel"}:
        import keural.model

        return getattr(keural.model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
