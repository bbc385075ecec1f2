"""Decoding, one token at a time.

In: prompt ids and sampling settings. Out: an iterator of token ids that can be closed at any moment. `Engine` is what chat and
server need; `TransformersEngine` is the plain one, a loop around the model with a key-value cache that survives between calls, so
that a chat's next turn only reads what is new.
"""

import math
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from keural.convert.hf import load_model, load_tokenizer, read_lineage
from keural.errors import UserError
from keural.tokenizer import KeuralTokenizer

Finish = Literal["stop", "length", "context"]
"""Why an answer ended: a stop token, `max_new_tokens`, or the end of the context."""

GREEDY_BELOW = 1e-5
"""A temperature this small is taken as 0: logits divided by it would overflow."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are the model card's."""

    temperature: float = 0.7
    """Logits are divided by it; 0 takes the most probable token."""
    top_p: float = 0.9
    """Sample from the smallest set of tokens with at least this probability."""
    repetition_penalty: float = 1.1
    """Tokens of the prompt and the answer so far: positive logits are divided by it, negative ones multiplied."""
    max_new_tokens: int = 256
    seed: int | None = None
    """Makes sampling repeatable; None draws a new seed for every answer."""

    def __post_init__(self) -> None:
        finite = math.isfinite(self.temperature) and math.isfinite(self.repetition_penalty)
        possible = self.temperature >= 0 and 0 <= self.top_p <= 1 and self.repetition_penalty > 0 and self.max_new_tokens >= 1
        if not (finite and possible and 0 <= (self.seed or 0) < 2**63):
            raise UserError(
                f"impossible sampling settings {self}: use temperature >= 0, 0 <= top_p <= 1, repetition_penalty > 0, "
                "max_new_tokens >= 1, 0 <= seed < 2**63"
            )


class Engine(Protocol):
    """Something that continues token ids."""

    tokenizer: KeuralTokenizer
    context_length: int
    """Tokens of prompt and answer together."""

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling, stop: Collection[int]) -> Generator[int, None, Finish]:
        """Yield the answer's ids without the stop token, then return why it ended; closing the generator cancels.

        Raises `UserError` when the prompt leaves no room for an answer.
        """


class TransformersEngine:
    """The transformers model in a decoding loop of our own, on the GPU where there is one. Not for concurrent use."""

    def __init__(self, path: Path, dtype: torch.dtype | None = None, device: str | None = None) -> None:
        """Load `path` (see `keural.convert.hf.load_model`) in `dtype`, by default the stored one. Raises `UserError`."""
        self.tokenizer = load_tokenizer(path)
        self.model = load_model(path, dtype).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.context_length: int = self.model.config.max_position_embeddings
        self._forget()

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling, stop: Collection[int]) -> Generator[int, None, Finish]:
        """See `Engine.stream`. Starting a new answer invalidates an unfinished earlier one."""
        check_prompt(prompt_ids, self.context_length)
        device = self.model.device
        generator = torch.Generator(device)
        _ = generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
        seen = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=device)
        seen[list(prompt_ids)] = True
        new_ids, length = self._reuse(prompt_ids), len(prompt_ids)
        for count in range(1, sampling.max_new_tokens + 1):
            token = choose(self._forward(new_ids), seen, sampling, generator)
            if token in stop:
                return "stop"
            yield token
            if length + count >= self.context_length:
                return "context"
            seen[token] = True
            new_ids = [token]
        return "length"

    def _reuse(self, prompt_ids: Sequence[int]) -> list[int]:
        """Keep the part of the cache that is a prefix of the prompt; returns the ids still to be read, at least one."""
        common = 0
        # The last prompt token is always read again: its logits are needed and the cache does not hold them.
        for cached, wanted in zip(self._cached_ids, prompt_ids[:-1], strict=False):
            if cached != wanted:
                break
            common += 1
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
    def _forward(self, ids: list[int]) -> Tensor:
        """Read ids after the cached ones; the logits `[V]` after the last, float32."""
        try:
            output = self.model(
                input_ids=torch.tensor([ids], device=self.model.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self._cached_ids += ids
        except BaseException:
            # An interrupt in the middle leaves some layers with the new keys and some without.
            self._forget()
            raise
        return output.logits[0, -1].float()

    def _forget(self) -> None:
        self._cached_ids: list[int] = []
        self._cache: Any = DynamicCache(config=self.model.config)


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> int:
    """Draw the next token from `logits` `[V]`; with temperature 0 the most probable one after the repetition penalty."""
    if sampling.temperature < GREEDY_BELOW:
        return int(penalise(logits, seen, sampling.repetition_penalty).argmax())
    probabilities = next_token_distribution(logits, seen, sampling)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def next_token_distribution(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities `[V]` to sample from: repetition penalty, then temperature, then the nucleus, renormalised.

    The order and the definitions are those of transformers' processors; temperature must be above 0. The nucleus is the smallest
    set of most probable tokens whose probability reaches `top_p` (Holtzman et al. 2020, eq. 2-3), at least one token.
    """
    scores = penalise(logits, seen, sampling.repetition_penalty) / sampling.temperature
    probabilities, order = scores.softmax(dim=-1).sort(descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    inside = before < sampling.top_p
    inside[0] = True
    kept = probabilities * inside
    return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum())


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens of `seen` `[V]` (bool) less likely (Keskar et al. 2019, section 4.1, with the sign taken into account)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def check_prompt(prompt_ids: Sequence[int], context_length: int) -> None:
    """Raise `UserError` when the prompt is empty or leaves no room for an answer."""
    if not prompt_ids:
        raise UserError("the prompt is empty; write something")
    if len(prompt_ids) >= context_length:
        raise UserError(f"the prompt has {len(prompt_ids)} tokens and the model's context is {context_length}; shorten it")


def chat_defaults(path: Path) -> tuple[Sampling, str | None]:
    """Sampling settings and system message that a model directory was saved with; the card's and none where it says nothing."""
    chat = read_lineage(path).get("chat", {})
    known = {name: chat[name] for name in ("temperature", "top_p", "repetition_penalty", "max_new_tokens") if name in chat}
    return replace(Sampling(), **known), chat.get("system")
