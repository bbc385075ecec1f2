"""The network of this package as slots: every slot's keys and values in one tensor a layer, one forward pass for all answers.

In: a model. Out: `Slots`. Of each slot the columns `start` to `end` of its row hold its keys, all of them also in sliding layers,
so that a slot can be cut back to any length. Answers under way end in the same column: their newest keys lie side by side, the
batch is a view, and a step copies nothing. Prompts are read one by one, each in its own columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keural.model import KeuralMoECausalLM
from keural.model.modeling_keural import KeuralTopKRouter
from keural.serve.batching.slots import Row

SPARE = 64
"""Columns beyond those in use that are made at a time: a slot moves back to the first column when it comes to the last."""
LONG_PART = 512
"""Tokens of a prompt that an accelerator reads at a time beside no other answer."""
GROUPED_FROM = 8
"""Tokens of a step from which all experts are computed in one product on a CPU; below, each chosen one by itself is quicker."""


class TransformersSlots:
    """`Slots` of a model that stands in inference mode on its device."""

    def __init__(
        self,
        model: KeuralMoECausalLM,
        count: int,
        context_length: int | None = None,
        batch_tokens: int = 128,
    ) -> None:
        self.model, self.count, self.batch_tokens = model, count, batch_tokens
        self.on_processors = model.device.type == "cpu"
        self.alone_tokens = batch_tokens if self.on_processors else max(batch_tokens, LONG_PART)
        config = model.config
        self.context_length = context_length or config.max_position_embeddings
        self._cache = _Columns(count, config.num_hidden_layers, config.num_key_value_heads, config.head_dim, model)
        self._start, self._end = [0] * count, [0] * count
        seen = {"full_attention": None, "sliding_attention": config.sliding_window}
        self._windows = {layer_type: seen[layer_type] or self.context_length for layer_type in config.layer_types}
        """How many keys a token of each layer type sees at most, itself among them."""
        routers = [module for module in model.modules() if isinstance(module, KeuralTopKRouter)]
        self._counts = [torch.zeros(router.num_experts, dtype=torch.int64, device=model.device) for router in routers]
        for router, counts in zip(routers, self._counts, strict=True):
            router.register_forward_hook(_counting(counts))

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> Tensor:
        """See `Slots.step`."""
        single: list[Row] = []
        logits: dict[int, Tensor] = {}
        for row in rows:
            if row.start != self._held(row.slot):
                raise ValueError(f"slot {row.slot} holds {self._held(row.slot)} tokens, not {row.start}")
        for row in rows:
            if len(row.ids) == 1 and row.wants_logits:
                single.append(row)
            elif (found := self._read(row)) is not None:
                logits[row.slot] = found
        if single:
            logits |= dict(zip([row.slot for row in single], self._decode(single), strict=True))
        wanted = [logits[row.slot] for row in rows if row.wants_logits]
        return torch.stack(wanted).float() if wanted else torch.empty(0, self.model.config.vocab_size)

    def cut(self, slot: int, length: int) -> int:
        """See `Slots.cut`."""
        self._end[slot] = min(self._end[slot], self._start[slot] + length)
        return self._held(slot)

    def copy(self, source: int, target: int, length: int) -> int:
        """See `Slots.copy`."""
        length = min(length, self._held(source))
        self._cache.move(source, self._start[source], target, 0, length)
        self._start[target], self._end[target] = 0, length
        return length

    def expert_load(self) -> Tensor:
        """How many tokens each layer's experts were given since the start `[layers, E]`; waits for the device."""
        return torch.stack(self._counts).cpu()

    def _held(self, slot: int) -> int:
        """How many tokens a slot holds."""
        return self._end[slot] - self._start[slot]

    def _read(self, row: Row) -> Tensor | None:
        """Read a part of a prompt; the logits `[V]` after its last token, where the row wants them."""
        slot, new = row.slot, len(row.ids)
        self._make_room([slot], new)
        start, held = self._start[slot], row.start
        self._cache.use(slice(slot, slot + 1), start, self._end[slot])
        output = self._forward([list(row.ids)], [list(range(held, held + new))], self._causal(held, new), row.wants_logits)
        self._end[slot] += new
        return None if output is None else output[0]

    def _decode(self, rows: Sequence[Row]) -> Tensor:
        """Read one token in each row's slot; the logits `[rows, V]`."""
        slots = [row.slot for row in rows]
        self._make_room(slots, 1)
        self._line_up(slots)
        lengths = [self._held(slot) for slot in slots]
        end, longest = self._end[slots[0]], max(lengths)
        self._cache.use(_as_slice(slots), end - longest, end)
        ids, positions = [list(row.ids) for row in rows], [[length] for length in lengths]
        output = self._forward(ids, positions, self._padded(lengths, longest), wants_logits=True)
        assert output is not None
        for slot in slots:
            self._end[slot] += 1
        return output

    def _forward(
        self, ids: list[list[int]], positions: list[list[int]], masks: dict[str, Any], wants_logits: bool
    ) -> Tensor | None:
        """Read ids `[B, T]`; the logits `[B, V]` after the last ones, where they are wanted: the head is the largest matrix."""
        device = self.model.device
        if device.type == "cpu":
            many = len(ids) * len(ids[0]) >= GROUPED_FROM
            self.model.config._experts_implementation = "grouped_mm" if many else "eager"
        read = {
            "input_ids": torch.tensor(ids, device=device),
            "position_ids": torch.tensor(positions, device=device),
            "attention_mask": masks,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        if not wants_logits:
            self.model.model(**read, positions_to_keep=slice(-1, None))
            return None
        found: Tensor = self.model(**read, logits_to_keep=1).logits[:, -1]
        return found

    def _make_room(self, slots: list[int], new: int) -> None:
        """Let every one of `slots` have `new` columns after its last."""
        if all(self._end[slot] + new <= self._cache.columns for slot in slots):
            return
        longest = max(map(self._held, slots))
        self._cache.grow(min(2 * (longest + new), self.context_length) + SPARE)
        for slot in slots:
            self._move(slot, longest if len(slots) > 1 else self._held(slot))

    def _line_up(self, slots: list[int]) -> None:
        """Let all of `slots` end in the same column: where most of them do and all have room."""
        longest = max(map(self._held, slots))
        ends = [self._end[slot] for slot in slots]
        fitting = [end for end in ends if end >= longest]
        end = max(fitting, key=lambda end: (ends.count(end), end))
        for slot in slots:
            self._move(slot, end)

    def _move(self, slot: int, end: int) -> None:
        """Let a slot's keys end in column `end`."""
        length = self._held(slot)
        if self._end[slot] != end:
            self._cache.move(slot, self._start[slot], slot, end - length, length)
            self._start[slot], self._end[slot] = end - length, end

    def _causal(self, held: int, new: int) -> dict[str, Any]:
        """Masks of `new` tokens after `held` ones, for each layer type."""
        masks: dict[str, Any] = {}
        for layer_type, window in self._windows.items():
            seen = min(held + new, window - 1 + new)
            key = torch.arange(held + new - seen, held + new)
            query = torch.arange(held, held + new)[:, None]
            masks[layer_type] = self._form(((key <= query) & (key > query - window))[None, None])
        return masks

    def _padded(self, lengths: list[int], longest: int) -> dict[str, Any]:
        """Masks of one new token after `lengths` ones that end in the same column, for each layer type."""
        masks: dict[str, Any] = {}
        for layer_type, window in self._windows.items():
            seen = min(longest + 1, window)
            if all(length + 1 >= seen for length in lengths):
                masks[layer_type] = None
                continue
            mask = torch.arange(seen) >= seen - 1 - torch.tensor(lengths)[:, None]
            masks[layer_type] = self._form(mask[:, None, None])
        return masks

    def _form(self, mask: Tensor) -> Tensor | None:
        """A mask as the attention function takes it; None where everything may be seen."""
        if mask.shape[2] == 1 and bool(mask.all()):
            return None
        mask = mask.to(self.model.device)
        if self.model.config._attn_implementation == "eager":
            added = torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device)
            return added.masked_fill_(~mask, torch.finfo(added.dtype).min)
        return mask


class _Columns:
    """Keys and values `[slots, heads, columns, D]` of every layer, in the part of a cache that the network uses."""

    def __init__(self, count: int, layers: int, heads: int, width: int | None, model: KeuralMoECausalLM) -> None:
        self.columns = 0
        assert width is not None  # filled in by the configuration
        empty = torch.empty(count, heads, 0, width, dtype=model.dtype, device=model.device)
        self._layers = [[empty, empty] for _ in range(layers)]
        self._slots: slice | list[int] = []
        self._start = self._end = 0

    @torch.inference_mode()
    def grow(self, columns: int) -> None:
        """Have at least so many columns, what they hold kept."""
        if columns <= self.columns:
            return
        for layer in self._layers:
            for place, held in enumerate(layer):
                count, heads, old, width = held.shape
                layer[place] = held.new_zeros(count, heads, columns, width)
                layer[place][:, :, :old] = held
        self.columns = columns

    @torch.inference_mode()
    def move(self, source: int, start: int, target: int, new_start: int, length: int) -> None:
        """Copy columns from one slot to another, or to another place of the same."""
        for layer in self._layers:
            for held in layer:
                part = held[source, :, start : start + length]
                held[target, :, new_start : new_start + length] = part.clone() if source == target else part

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The keys and the values `[slots, heads, columns, D]` of a layer."""
        keys, values = self._layers[index]
        return keys, values

    def use(self, slots: slice | list[int], start: int, end: int) -> None:
        """Let the next forward pass see columns `start` to `end` of these slots, and write from `end` on."""
        self._slots, self._start, self._end = slots, start, end

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What an attention layer calls: take the new keys and values `[B, heads, T, D]`, give all that it may see."""
        end = self._end + keys.shape[2]
        found = []
        for held, new in zip(self._layers[layer_idx], (keys, values), strict=True):
            held[self._slots, :, self._end : end] = new
            found.append(held[self._slots, :, self._start : end])
        return found[0], found[1]


def _as_slice(slots: list[int]) -> slice | list[int]:
    """Neighbours as a slice, whose part of a tensor is a view."""
    first = slots[0]
    return slice(first, first + len(slots)) if slots == list(range(first, first + len(slots))) else slots


def _counting(counts: Tensor) -> Any:
    """A hook of a router that adds up which experts it chose."""

    def hook(_module: KeuralTopKRouter, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen = output[2].reshape(-1)
        counts.scatter_add_(0, chosen, torch.ones_like(chosen))

    return hook
