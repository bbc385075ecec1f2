"""Slots whose steps of one token a row are CUDA graphs: on a GPU a step is hundreds of short kernels, and starting them one by one
takes several times as long as they do.

In: a model on its device. Out: `Slots`. Every slot's tokens begin in its first column, so that a graph finds them; prompts are read
as by `TransformersSlots`. There is a graph for each of a few sizes of batch; rows that are missing to the next size repeat the
first one, which costs no more reading of weights.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from keural.errors import UserError
from keural.model import KeuralMoECausalLM
from keural.serve.batching.fixed_step import (
    FIXED_ROPE,
    Parts,
    Rows,
    compiled_parts,
    layer_weights,
    mark_sizes,
    step_settings,
)
from keural.serve.batching.slots import Row
from keural.serve.batching.transformers_slots import TransformersSlots


class GraphedSlots(TransformersSlots):
    """`Slots` of a model that stands in inference mode on its device. Memory for all slots is taken at once."""

    def __init__(
        self,
        model: KeuralMoECausalLM,
        count: int,
        context_length: int | None = None,
        batch_tokens: int = 128,
        parts: Parts | None = None,
    ) -> None:
        """`parts`: what a step is made of; None compiles it where the device is a GPU.

        Raises:
            UserError: where the device's memory does not hold the slots.
        """
        super().__init__(model, count, context_length, batch_tokens)
        on_gpu = model.device.type == "cuda"
        self._parts = parts or (compiled_parts() if on_gpu else Parts())
        self._weights, self._settings = layer_weights(model), step_settings(model)
        self._sizes = sorted({min(2**power, count) for power in range(count.bit_length() + 1)})
        self._buffers = {size: torch.zeros(len(Rows._fields), size, dtype=torch.int64, device=model.device) for size in self._sizes}
        self._steps: dict[int, Callable[[], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        try:
            self._cache.grow(self.context_length)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{count} answers of {self.context_length:,} tokens do not fit into the device's memory beside the model; give "
                "fewer with --slots, or --eager, which takes memory as answers grow"
            ) from error

    def prepare(self) -> None:
        """Make the graph of every size of batch, so that no request waits for the compiler.

        Before the first request: the first slot's first column is written over.

        Raises:
            UserError: where a step cannot be compiled on this machine.
        """
        try:
            for size in self._sizes:
                self._step_of(size, [[0] * size] * len(Rows._fields))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises: what it lacks is for whoever set up the machine
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"the network's step cannot be compiled here ({reason:.200}); start with --eager") from error

    @torch.inference_mode()
    def _decode(self, rows: Sequence[Row]) -> Tensor:
        """Read one token in each row's slot; the logits `[rows, V]`, good until the next step."""
        size = next(size for size in self._sizes if size >= len(rows))
        missing = size - len(rows)
        filled = [*rows, *[rows[0]] * missing]
        counted = [1] * len(rows) + [0] * missing
        step = self._step_of(size, [*zip(*((row.ids[0], row.slot, row.start) for row in filled), strict=True), counted])
        logits = step()[: len(rows)]
        for row in rows:
            self._end[row.slot] += 1
        return logits

    def _step_of(self, size: int, values: Sequence[Sequence[int]]) -> Callable[[], Tensor]:
        """A step of rows whose `Rows` these are; made where there is none of their number."""
        given = torch.tensor(values)
        if size not in self._steps:
            self._buffers[size].copy_(given)
            self._buffers[size][-1] = 0
            self._steps[size] = self._captured(size)
        self._buffers[size].copy_(given)
        return self._steps[size]

    @torch.inference_mode()
    def _captured(self, size: int) -> Callable[[], Tensor]:
        """The step as a graph; on a processor as it is. It is run with the rows in the buffer, which can be run again."""

        def run() -> Tensor:
            return self._run(Rows(*self._buffers[size]))

        if self._pool is None:
            run()
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = run()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    def _run(self, rows: Rows) -> Tensor:
        """Float32 logits `[B, V]` after one new token of each row."""
        network, settings = self.model.model, self._settings
        hidden = network.embed_tokens(rows.ids)
        cosines, sines = network.rotary_emb(hidden, rows.lengths[:, None])
        angles = (cosines[:, 0], sines[:, 0])
        firsts = {layer_type: (rows.lengths - window + 1).clamp_min(0) for layer_type, window in self._windows.items()}
        for layer, layer_type in enumerate(self.model.config.layer_types):
            keys, values = self._cache.layer(layer)
            mark_sizes(hidden, rows, angles, firsts[layer_type])
            hidden = self._parts.layer(
                hidden, self._weights[layer], keys, values, rows, angles, firsts[layer_type], self._counts[layer], settings
            )
        return self._parts.head(hidden, network.norm.weight, self.model.lm_head.weight, settings.epsilon)


def can_be_graphed(model: KeuralMoECausalLM) -> bool:
    """Whether a step's shapes and positions are fixed: not where the frequencies of positions change with an answer's length."""
    return model.config.rope_parameters["rope_type"] in FIXED_ROPE
