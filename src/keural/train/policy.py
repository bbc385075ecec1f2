"""The model as training sees it: one forward pass from a packed batch to log-probabilities and router logits.

It is a module of its own so that the head's weight is used inside the outermost forward pass, which is where FSDP2 has it whole.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from keural.model import KeuralMoECausalLM
from keural.train.losses import token_logprobs


class PolicyOutput(NamedTuple):
    """Log-probabilities of the labels, float32 ``[rows, T]`` and 0 where there is none; router logits, one ``[rows * T, E]``
    per layer.
    """

    logprobs: Tensor
    router_logits: tuple[Tensor, ...]


class Policy(nn.Module):
    """A `KeuralMoECausalLM` that is trained, computing in `compute_dtype` over whatever its weights are stored in."""

    def __init__(self, model: KeuralMoECausalLM, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor | None) -> PolicyOutput:
        """Run packed rows ``[rows, T]``; `position_ids` restart per document. Without labels the head is not used."""
        autocast = torch.autocast(input_ids.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)
        with autocast:
            outputs = self.model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, output_router_logits=True)
        hidden = outputs.last_hidden_state.to(self.compute_dtype)
        if labels is None:
            return PolicyOutput(torch.zeros(input_ids.shape, device=input_ids.device), outputs.router_logits)
        logprobs = token_logprobs(hidden.flatten(0, 1), self.model.get_output_embeddings().weight, labels.flatten())
        return PolicyOutput(logprobs.view_as(labels), outputs.router_logits)
