"""The transformers engine: a model directory, the network of this package, on the GPU where there is one.

In: a model directory. Out: an `Engine`. The key-value cache survives between calls, so that a chat's next turn only reads what is
new.
"""

from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from keural.pretrained.cached_step import check_cached_step
from keural.pretrained.stored_model import build, open_model
from keural.serve.engines.base import Finish
from keural.serve.engines.decoding import check_prompt, common_prefix, decode
from keural.serve.engines.sampling_params import SamplingParams


class TransformersEngine:
    """The transformers model behind a decoding loop of our own. Not for concurrent use."""

    def __init__(self, path: Path, dtype: torch.dtype | None = None, device: str | None = None, threads: int | None = None) -> None:
        """Load `path` (see `keural.pretrained.stored_model.open_model`) in `dtype`, by default the stored one.

        `threads` sets how many threads torch uses in this process; None leaves that as it is. Raises `UserError`, also where the
        model would generate wrong text (see `keural.pretrained.cached_step`).
        """
        if threads is not None:
            torch.set_num_threads(threads)
        stored = open_model(path)
        self.tokenizer, self.unverified = stored.tokenizer, stored.notice
        self.model = build(stored, dtype).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.model.device.type == "cpu":
            self.model.set_experts_implementation("eager")  # the model's own loop, which reads the chosen experts only
        check_cached_step(self.model, stored.directory)
        self.context_length: int = self.model.config.max_position_embeddings
        # A single token may see every key that the cache keeps, so that no mask has to be made for it.
        self._single_token_masks = dict.fromkeys(self.model.config.layer_types)
        self._forget()

    def stream(self, prompt_ids: Sequence[int], sampling: SamplingParams, stop: Collection[int]) -> Generator[int, None, Finish]:
        """See `Engine.stream`. Starting a new answer invalidates an unfinished earlier one."""
        check_prompt(prompt_ids, self.context_length)
        return (yield from decode(self._read, self._reuse(prompt_ids), prompt_ids, sampling, stop, self.context_length))

    def _reuse(self, prompt_ids: Sequence[int]) -> list[int]:
        """Keep the part of the cache that is a prefix of the prompt; returns the ids still to be read, at least one."""
        common = common_prefix(self._cached_ids, prompt_ids)
        surplus = len(self._cached_ids) - common
        if surplus and not self._can_shorten():
            self._forget()
            return list(prompt_ids)
        if surplus:
            self._cache.crop(-surplus)
            del self._cached_ids[common:]
        return list(prompt_ids[common:])

    def _can_shorten(self) -> bool:
        """A sliding layer has dropped its oldest keys once its window is full; what it dropped cannot come back."""
        config = self.model.config
        return "sliding_attention" not in config.layer_types or len(self._cached_ids) < config.sliding_window

    @torch.inference_mode()
    def _read(self, ids: list[int]) -> Tensor:
        """Read ids after the cached ones; the logits `[V]` after the last, float32."""
        try:
            output = self.model(
                input_ids=torch.tensor([ids], device=self.model.device),
                attention_mask=self._single_token_masks if len(ids) == 1 else None,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self._cached_ids += ids
        except BaseException:
            # An interrupt in the middle leaves some layers with the new keys and some without.
            self._forget()
            raise
        found: Tensor = output.logits[0, -1].float()
        return found

    def _forget(self) -> None:
        self._cached_ids: list[int] = []
        self._cache: Any = DynamicCache(config=self.model.config)
