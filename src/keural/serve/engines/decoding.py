"""The loop that every engine runs: read what is new, choose a token, until there is a reason to end.

In: a function from ids to logits, what the engine's cache holds, the prompt. Out: an iterator of token ids that can be closed at
any moment.
"""

from collections.abc import Callable, Collection, Generator, Sequence

import torch
from torch import Tensor

from keural.errors import UserError
from keural.serve.engines.base import Finish
from keural.serve.engines.sampling import NOT_FINITE, Sampler, choose
from keural.serve.engines.sampling_params import SamplingParams

Read = Callable[[list[int]], Tensor]
"""Reads ids after those already cached; gives the logits `[V]` after the last one, float32, good until the next call."""


def decode(
    read: Read,
    unread: list[int],
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    stop: Collection[int],
    context_length: int,
) -> Generator[int, None, Finish]:
    """Yield the ids that follow the prompt without the stop token, then return why they end; closing the generator cancels.

    `unread` is the end of the prompt that the cache does not hold, at least one id. A token is read only when the one after it is
    asked for, so that what was yielded last need not be in the cache.
    """
    logits = read(unread)
    sampler = Sampler(sampling, prompt_ids, logits.shape[-1])
    for count in range(1, sampling.max_new_tokens + 1):
        if not torch.isfinite(logits.sum()):
            raise UserError(NOT_FINITE)
        (token,) = choose(logits[None], [sampler])
        if token in stop:
            return "stop"
        yield token
        if len(prompt_ids) + count >= context_length:
            return "context"
        if count < sampling.max_new_tokens:
            logits = read([token])
    return "length"


def common_prefix(cached: Sequence[int], prompt_ids: Sequence[int]) -> int:
    """How many ids of the cache the prompt begins with, not counting its last.

    The last prompt token is always read again: its logits are needed, and no cache holds them.
    """
    common, most = 0, min(len(cached), len(prompt_ids) - 1)
    if most <= 0 or cached[0] != prompt_ids[0]:  # a scheduler asks this of every slot for every request
        return 0
    wanted = list(prompt_ids)
    if list(cached[:most]) == wanted[:most]:
        return most
    while common < most:  # whole pieces are compared
        middle = (common + most + 1) // 2
        if list(cached[common:middle]) == wanted[common:middle]:
            common = middle
        else:
            most = middle - 1
    return common


def check_prompt(prompt_ids: Sequence[int], context_length: int) -> None:
    """Raise `UserError` when the prompt is empty or leaves no room for an answer."""
    if not prompt_ids:
        raise UserError("the prompt is empty; write something")
    if len(prompt_ids) >= context_length:
        raise UserError(f"the prompt has {len(prompt_ids)} tokens and the model's context is {context_length}; shorten it")
