"""Batched greedy answers.

In: a model, its tokenizer, chats as messages. Out: answer texts. Chats are rendered by ids with the renderer that training uses; no
prompt is ever built as a string. Where nothing is drawn this takes a third of the processor time of the serving scheduler
(`keural.evaluate.generated`), whose rows leave as they finish.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from keural.errors import UserError
from keural.model import KeuralMoECausalLM
from keural.tokenizer import KeuralTokenizer, Message, render_prompt

Chat = Sequence[Message]


@torch.inference_mode()
def greedy(
    model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, prompts: Sequence[Chat], max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """The most probable continuation of each chat as the assistant's next turn, token by token.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: the model's.
        prompts: chats that end with a user turn.
        max_new_tokens: an answer without `<|im_end|>` is cut after so many tokens, or where the context is full.
        batch_size: chats generated together, padded on the left; the result does not depend on it beyond rounding.

    Returns:
        The answers' texts in the order of `prompts`, control tokens left out.

    Raises:
        UserError: when a prompt leaves no room for an answer in the model's context.
    """
    rendered = [render_prompt(tokenizer, prompt) for prompt in prompts]
    stop = {tokenizer.im_end_id, tokenizer.eos_id}
    found = continuations(model, rendered, stop, tokenizer.pad_id, max_new_tokens, batch_size)
    return [tokenizer.decode(ids) for ids in found]


@torch.inference_mode()
def continuations(
    model: KeuralMoECausalLM,
    prompts: Sequence[Sequence[int]],
    stop: set[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[list[int]]:
    """The most probable ids after each prompt's, up to the first of `stop`, which is left out.

    Arguments otherwise, and what is raised, as for `greedy`.
    """
    context = model.config.max_position_embeddings
    _check_length(max(map(len, prompts), default=0) + 1, context)
    found: list[list[int]] = [[] for _ in prompts]
    for batch in _batches([len(ids) for ids in prompts], batch_size):
        input_ids, mask = _pad_left([prompts[index] for index in batch], pad_id, model.device)
        for index, ids in zip(batch, _most_probable(model, input_ids, mask, max_new_tokens, stop), strict=True):
            found[index] = until(ids[: context - len(prompts[index])], stop)
    return found


def until(ids: Sequence[int], stop: set[int]) -> list[int]:
    """The ids before the first of `stop`."""
    end = next((position for position, token in enumerate(ids) if token in stop), len(ids))
    return list(ids[:end])


def _most_probable(model: KeuralMoECausalLM, input_ids: Tensor, mask: Tensor, count: int, stop: set[int]) -> list[list[int]]:
    """At most `count` greedy tokens after each left-padded row of `[B, T]`; what follows a row's stop token means nothing.

    A loop of our own, because `generate` fills in whatever penalties the model directory asks for.
    """
    cache = DynamicCache(config=model.config)
    position_ids = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    ends = torch.tensor(sorted(stop), device=input_ids.device)
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    columns: list[Tensor] = []
    while len(columns) < count and not bool(finished.all()):
        output = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        columns.append(output.logits[:, -1].argmax(dim=-1))
        finished |= torch.isin(columns[-1], ends)
        input_ids = columns[-1][:, None]
        mask = torch.cat([mask, torch.ones_like(input_ids)], dim=-1)
        position_ids = position_ids[:, -1:] + 1
    return [list(row) for row in torch.stack(columns, dim=1).tolist()]


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in groups of similar length, longest first, so that memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[B, T]` with the padding on the left."""
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        raise UserError(
            f"a chat of {length} tokens with its answer exceeds the model's context of {limit}; shorten it or allow fewer tokens"
        )
