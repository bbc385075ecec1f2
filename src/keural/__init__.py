"""Keural: a Korean-English mixture-of-experts language model, from raw text to a chat.

Importing the package registers the architecture with transformers, so that `AutoModelForCausalLM.from_pretrained(DIR)` works.
"""

from keural.errors import UserError
from keural.model import KeuralConfig, KeuralMoECausalLM, KeuralMoEModel

__version__ = "0.1.0"
__all__ = ["KeuralConfig", "KeuralMoECausalLM", "KeuralMoEModel", "UserError", "__version__"]
