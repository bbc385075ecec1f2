"""ChatML: conversations to ids, and which of them are trained.

In: messages. Out: ids and a loss mask. Every turn is `<|im_start|>role\\ncontent<|im_end|>\\n`. The markers are put in as ids; role
and content are encoded as plain text, each on its own. So content that spells a marker stays text, and a turn has the same ids
whatever comes before or after it: `render(messages[:k])` is a prefix of `render(messages)`. Training and serving both use `render`.

The Jinja template beside this file gives the same ids and mask through transformers' `apply_chat_template` for ordinary content.
It differs where a string template must: content that spells a marker or a control piece (`<bos>`) becomes control ids there, and
content that starts with white space may share a piece with the newline before it (lossless) or keep a space (published).
"""

from collections.abc import Sequence
from typing import NamedTuple

from keural.errors import UserError
from keural.tokenizer.load import KeuralTokenizer

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


class Rendered(NamedTuple):
    """Ids of a conversation, and for each id 1 if it is trained (content and end marker of assistant turns), else 0."""

    ids: list[int]
    mask: list[int]


def render(tokenizer: KeuralTokenizer, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
    """The ids and loss mask of `messages`; with `add_generation_prompt` the opening of an assistant turn follows.

    No bos is put first. Raises `UserError` for a role other than system, user and assistant.
    """
    ids: list[int] = []
    mask: list[int] = []
    line_end = tokenizer.encode("\n")
    for message in messages:
        opening = _opening(tokenizer, message.role)
        content = [*tokenizer.encode(message.content), tokenizer.im_end_id]
        trained = int(message.role == "assistant")
        ids += opening + content + line_end
        mask += [0] * len(opening) + [trained] * len(content) + [0] * len(line_end)
    if add_generation_prompt:
        opening = _opening(tokenizer, "assistant")
        ids += opening
        mask += [0] * len(opening)
    return Rendered(ids, mask)


def render_prompt(tokenizer: KeuralTokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids a model is asked to continue: the conversation and the opening of the assistant's turn."""
    return render(tokenizer, messages, add_generation_prompt=True).ids


def _opening(tokenizer: KeuralTokenizer, role: str) -> list[int]:
    if role not in ROLES:
        raise UserError(f"unknown role {role!r} in a conversation; use {', '.join(ROLES)}")
    return [tokenizer.im_start_id, *tokenizer.encode(role + "\n")]
