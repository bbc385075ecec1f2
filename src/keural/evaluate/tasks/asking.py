"""How items become token ids for one model.

In: text. Out: ids. A base model reads a text as it was trained to, `<s>` first (or without it, as it is asked to); a chat model is
asked by the renderer that training and serving use. Context and continuation are divided as lm-eval divides them, so that figures
can be compared: white space at the end of the context belongs to the continuation, and the continuation is what the whole text's
ids have beyond the context's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from keural.evaluate.tasks.items import Likelihood, Unusable
from keural.tokenizer import KeuralTokenizer, Message, render, render_prompt

Prompting = Literal["bos", "text", "chat"]
"""bos: text after `<s>`; text: without; chat: a user's turn in ChatML."""
TooLong = Literal["leave-out", "cut"]
"""What becomes of an item that does not fit into the context: it is left out, or cut at its beginning; both are counted."""


@dataclass(frozen=True)
class Asking:
    """A model's tokenizer, how it is asked, and how much it can read."""

    tokenizer: KeuralTokenizer
    prompting: Prompting
    context_length: int
    """Tokens that the network reads at most."""
    too_long: TooLong = "leave-out"
    system: str | None = None
    """System turn of chats."""

    def likelihood(self, prompt: str, continuation: str) -> tuple[Likelihood, int]:
        """The request for a text after a prompt, and how many tokens were cut off the prompt.

        Raises `Unusable` where it is too long, or where the continuation is no token of its own.
        """
        context, following = self._chat(prompt, continuation) if self.prompting == "chat" else self._text(prompt, continuation)
        return self._fitted(context, following)

    def prompt(self, text: str) -> list[int]:
        """The ids after which an answer is written; white space at the end of a text stays, as it may be what is asked for."""
        if self.prompting == "chat":
            return self._turn(text)
        bos = [self.tokenizer.bos_id]
        return (bos if self.prompting == "bos" or not text else []) + self.tokenizer.encode(text)

    def answer(self, messages: Sequence[Message], answer: str) -> tuple[Likelihood, int]:
        """The request for an assistant's turn after a conversation, `<|im_end|>` included, as preference training counts it.

        The system turn is put before a conversation that has none.

        Raises `Unusable` where it is too long.
        """
        has_own = bool(messages) and messages[0].role == "system"
        messages = [*self._system(), *messages] if not has_own else messages
        return self._fitted(*answer_after(self.tokenizer, messages, answer))

    def _text(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        blank = len(prompt) - len(prompt.rstrip())
        prompt, continuation = prompt[: len(prompt) - blank], prompt[len(prompt) - blank :] + continuation
        bos = [self.tokenizer.bos_id]
        if not prompt:  # there must be something to predict from
            return bos, self.tokenizer.encode(continuation)
        before, whole = self.tokenizer.encode_batch([prompt, prompt + continuation])
        return (bos if self.prompting == "bos" else []) + before, whole[len(before) :]

    def _chat(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        return self._turn(prompt), self.tokenizer.encode(continuation.lstrip())

    def _turn(self, prompt: str) -> list[int]:
        return render_prompt(self.tokenizer, [*self._system(), Message("user", prompt.strip())])

    def _system(self) -> list[Message]:
        return [Message("system", self.system)] if self.system else []

    def _fitted(self, context: list[int], following: list[int]) -> tuple[Likelihood, int]:
        if not following or not context:
            raise Unusable("no_token", "an answer is no token of its own after the question")
        surplus = max(0, len(context) + len(following) - 1 - self.context_length)
        if surplus and (self.too_long == "leave-out" or surplus >= len(context)):
            raise Unusable("too_long", f"{len(context) + len(following):,} tokens")
        return Likelihood(tuple(context[surplus:]), tuple(following)), surplus


def answer_after(tokenizer: KeuralTokenizer, messages: Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
    """The ids of a conversation, and those of an assistant's turn after it that are trained, `<|im_end|>` included."""
    start = render_prompt(tokenizer, messages)
    whole = render(tokenizer, [*messages, Message("assistant", answer)])
    return start, [token for token, trained in list(zip(whole.ids, whole.mask, strict=True))[len(start) :] if trained]


def with_cut(found: Sequence[tuple[Likelihood, int]]) -> tuple[list[Likelihood], dict[str, Any]]:
    """Requests, and the most tokens that one of them lost, to be noted of their item."""
    cut = max(surplus for _, surplus in found)
    return [request for request, _ in found], {"cut": cut} if cut else {}


def lengths_of(choices: Sequence[str], asked: Sequence[Likelihood]) -> dict[str, list[int]]:
    """What each rule of scoring divides a choice's log-probability by."""
    return {
        "sum": [1] * len(choices),
        "per_character": [len(choice) for choice in choices],
        "per_byte": [len(choice.encode()) for choice in choices],
        "per_token": [len(request.continuation) for request in asked],
    }
