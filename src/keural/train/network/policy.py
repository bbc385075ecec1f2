"""The model as training sees it: one forward pass from a packed micro-batch to log-probabilities and router logits.

It is a module of its own so that the head's weight is used inside the outermost forward pass, which is where FSDP2 has it whole.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from keural.lora.layers import TrainedAdapter, adapter_off
from keural.model import KeuralMoECausalLM
from keural.recipe import TrainSpec
from keural.train.losses import Weighing, token_logprobs
from keural.train.micro_batches import MicroBatch
from keural.train.network.document_attention import IMPLEMENTATION, DocumentStacks, document_offsets, stack_documents
from keural.train.processes.modes import by_engine
from keural.train.processes.ranks import Ranks


class PolicyOutput(NamedTuple):
    """Log-probabilities of the labels, float32 ``[rows, T]`` and 0 where there is none; router logits, one ``[rows * T, E]``
    per layer.
    """

    logprobs: Tensor
    router_logits: tuple[Tensor, ...]


Compute = Callable[[KeuralMoECausalLM, MicroBatch, bool, Weighing | None], PolicyOutput]
"""A forward pass: a model, packed rows, whether the log-probabilities of their labels are wanted, and how the loss weighs them."""


class Policy(nn.Module):
    """A `KeuralMoECausalLM` that is trained, computing in `compute_dtype` over whatever its weights are stored in; by the model's
    own layers, or by an `engine`. With an `adapter` the model's layers are PEFT's, and the adapter alone is trained. `by_documents`
    lets the layers attend to one document after another (on a CPU) instead of masking rows.
    """

    def __init__(
        self,
        model: KeuralMoECausalLM,
        compute_dtype: torch.dtype,
        engine: Compute | None = None,
        adapter: TrainedAdapter | None = None,
        *,
        by_documents: bool = False,
    ) -> None:
        super().__init__()
        self.by_documents = by_documents
        if by_documents:
            model.set_attn_implementation(IMPLEMENTATION)
        self.model = model
        self.compute_dtype = compute_dtype
        self.engine = engine
        self.adapter = adapter

    def without_adapter(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the policy is the model that its stage started from, as long as nothing but an adapter was trained."""
        return contextlib.nullcontext() if self.adapter is None else adapter_off(self.model)

    def forward(self, micro: MicroBatch, with_labels: bool = True, weighing: Weighing | None = None) -> PolicyOutput:
        """Run packed rows ``[rows, T]``. Without labels the head is not used, and log-probabilities are 0. `weighing` of the loss
        saves a pass over the head.
        """
        if self.engine is not None:
            return self.engine(self.model, micro, with_labels, weighing)
        autocast = torch.autocast(micro.input_ids.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)
        ids, positions = micro.input_ids, micro.position_ids
        inputs = (
            {"input_ids": ids} if micro.noise is None else {"inputs_embeds": self.model.get_input_embeddings()(ids) + micro.noise}
        )
        with autocast:
            outputs = self.model.model(
                **inputs, position_ids=positions, attention_mask=self._masks(micro), use_cache=False, output_router_logits=True
            )
        hidden = outputs.last_hidden_state.to(self.compute_dtype)
        if not with_labels:
            return PolicyOutput(torch.zeros(ids.shape, device=ids.device), outputs.router_logits)
        head, labels = self.model.get_output_embeddings().weight, micro.labels.flatten()
        logprobs = token_logprobs(hidden.flatten(0, 1), head, labels, weighing=weighing)
        return PolicyOutput(logprobs.view_as(micro.labels), outputs.router_logits)

    def _masks(self, micro: MicroBatch) -> dict[str, DocumentStacks] | None:
        """What the layers of each type go by; None: masks that the model makes of the positions."""
        if not self.by_documents:
            return None
        offsets, config = document_offsets(micro.positions), self.model.config
        windows = {"full_attention": None, "sliding_attention": config.sliding_window}
        return {kind: stack_documents(offsets, windows[kind]) for kind in dict.fromkeys(config.layer_types)}


def needs_engine(spec: TrainSpec, ranks: Ranks) -> bool:
    """Whether a stage is computed by the training engine, see `by_engine`."""
    return by_engine(spec, ranks.device.type == "cuda")
