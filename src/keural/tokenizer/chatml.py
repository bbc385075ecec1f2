"""ChatML: conversations to ids, and which of them are trained.

In: messages. Out: ids and a loss mask. Every turn is `<|im_start|>role\\ncontent<|im_end|>\\n`. The markers are put in as ids; role
and content are encoded as plain text, each on its own. So content that spells a marker stays text, and a turn has the same ids
whatever comes before or after it: `render(messages[:k])` is a prefix of `render(messages)`. Training and serving both use `render`.
How tools and reasoning are written in a turn is said in `message.py`.

The Jinja template beside this file gives the same ids and mask through transformers' `apply_chat_template` for ordinary content.
It differs where a string template must: content that spells a marker or a control piece (`<bos>`) becomes control ids there, and
content that starts with white space may share a piece with the newline before it (lossless) or keep a space (published). And its
mask is that of whole assistant turns; which turns, or whose reasoning, a data set does not want trained only `render` knows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from keural.errors import UserError
from keural.tokenizer.load import KeuralTokenizer
from keural.tokenizer.message import ROLES, Message, with_tools

__all__ = ["ROLES", "Message", "Rendered", "render", "render_prompt"]


class Rendered(NamedTuple):
    """Ids of a conversation, and for each id 1 if it is trained (`Message.trained`), else 0."""

    ids: list[int]
    mask: list[int]


def render(
    tokenizer: KeuralTokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Rendered:
    """The ids and loss mask of `messages`; with `add_generation_prompt` the opening of an assistant turn follows.

    `tools` are definitions for the system turn (`with_tools`). No bos is put first. Raises `UserError` for a role other than
    system, user, assistant and tool.
    """
    ids: list[int] = []
    mask: list[int] = []
    line_end = tokenizer.encode("\n")
    for message in with_tools(messages, tools) if tools else messages:
        opening = _opening(tokenizer, message.role)
        ids += opening
        mask += [0] * len(opening)
        trained = False
        for text, trained in message.parts():
            content = tokenizer.encode(text)
            ids += content
            mask += [int(trained)] * len(content)
        ids += [tokenizer.im_end_id, *line_end]
        mask += [int(trained)] + [0] * len(line_end)
    if add_generation_prompt:
        opening = _opening(tokenizer, "assistant")
        ids += opening
        mask += [0] * len(opening)
    return Rendered(ids, mask)


def render_prompt(tokenizer: KeuralTokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
    """The ids a model is asked to continue: the conversation and the opening of the assistant's turn."""
    return render(tokenizer, messages, add_generation_prompt=True, tools=tools).ids


def _opening(tokenizer: KeuralTokenizer, role: str) -> list[int]:
    if role not in ROLES:
        raise UserError(f"unknown role {role!r} in a conversation; use {', '.join(ROLES)}")
    return [tokenizer.im_start_id, *tokenizer.encode(role + "\n")]
