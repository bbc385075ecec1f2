"""The architecture: configuration and network, registered with transformers' Auto classes on import.

Nothing of the rest of the package is imported here; the two files beside this one also travel with exported weights.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_keural import KeuralConfig, ParameterCount, count_parameters
from .modeling_keural import KeuralMoECausalLM, KeuralMoEModel, KeuralPreTrainedModel, router_losses
from .shape import SHAPE
from .vocabulary import CHATML_IDS, grow_vocabulary, mean_row

AutoConfig.register(KeuralConfig.model_type, KeuralConfig, exist_ok=True)
AutoModel.register(KeuralConfig, KeuralMoEModel, exist_ok=True)
AutoModelForCausalLM.register(KeuralConfig, KeuralMoECausalLM, exist_ok=True)

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
]
