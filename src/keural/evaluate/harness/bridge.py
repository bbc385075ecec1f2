"""A model of this package as lm-eval sees one, so that any of its tasks runs on it.

In: lm-eval's requests, as text. Out: log-probabilities and answers, from the network and scorer that the package's own tasks use.
Where a request does not fit, it is cut at its beginning as lm-eval's own models cut it, and counted.

Imports lm-eval; only `keural.evaluate.harness.running` imports this file, and only when it is asked for.
"""

from collections.abc import Sequence
from typing import Any

import lm_eval.models  # noqa: F401  (first: a class that is registered before these makes lm-eval 0.4.13 forget its own)
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from keural.errors import UserError
from keural.evaluate.generated.kind import answer
from keural.evaluate.models import EvaluatedModel
from keural.evaluate.tasks.items import Likelihood, Writing
from keural.tokenizer import Message, render_prompt

MAX_NEW_TOKENS = 256
"""Of an answer, where a task does not say; lm-eval's own number."""
_HONOURED = {"until", "do_sample", "temperature", "top_p", "max_gen_toks"}
_WITHOUT_EFFECT = {
    "num_beams": 1,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
    "use_cache": True,
    "seed": None,
}
"""Settings that change nothing where they have these values."""


class KeuralLM(TemplateLM):
    """An evaluated model for `lm_eval.simple_evaluate(model=KeuralLM(model), …)`."""

    def __init__(self, model: EvaluatedModel) -> None:
        """`model` says how texts begin (`bos` or `text`), or that they are chats; pass `apply_chat_template=True` then."""
        super().__init__()
        self._model, self._asking = model, model.asking
        self._chats: dict[str, list[int]] = {}
        self.cut = 0
        """Requests that lost their beginning, because they were longer than the context."""

    @property
    def eot_token_id(self) -> int:
        """`</s>`."""
        return self._asking.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is predicted from: `<s>`."""
        return self._asking.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens that the network reads at most."""
        return self._asking.context_length

    @property
    def tokenizer_name(self) -> str:
        """Of the tokenizer, for lm-eval's cache of requests."""
        return self._model.identity.tokenizer

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """A name: chats are rendered by ids, no template is filled in."""
        return "ChatML by ids" if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text for people, whose ids are kept: what a message says can never become a control token."""
        if not add_generation_prompt:
            raise UserError("this task begins the assistant's answer itself, which chats by ids do not know; leave --chat out")
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        shown = "".join(f"<|im_start|>{message.role}\n{message.text}<|im_end|>\n" for message in messages)
        text = f"{shown}<|im_start|>assistant\n"
        self._chats[text] = render_prompt(self._asking.tokenizer, messages)
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, after `<s>` where the model is asked so and nothing else is said."""
        if string in self._chats:
            return self._chats[string]
        begins = self._asking.prompting == "bos" if add_special_tokens is None else add_special_tokens
        return ([self._asking.tokenizer.bos_id] if begins else []) + self._asking.tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self._chats:
            return self._chats[context], self._asking.tokenizer.encode(continuation.lstrip())
        found: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        asked = []
        for _, context, continuation in requests:
            surplus = len(context) + len(continuation) - 1 - self.max_length
            if surplus >= len(context):
                raise UserError(f"an answer of {len(continuation):,} tokens does not fit into a context of {self.max_length:,}")
            self.cut += surplus > 0
            asked.append((Likelihood(tuple(context[max(0, surplus) :]), tuple(continuation)),))
        found = {number: answers[0] for batch in self._model.network.likelihoods(asked) for number, answers in batch}
        return [(found[number].total, found[number].greedy) for number in range(len(asked))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in lm-eval's windows: every token once, with as much before it as fits."""
        asked = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            asked.append([Likelihood(tuple(first), tuple(then)) for first, then in map(make_disjoint_window, windows)])
        found = [0.0] * len(asked)
        filled = [number for number, group in enumerate(asked) if group]
        for batch in self._model.network.likelihoods([asked[number] for number in filled]):
            for place, answers in batch:
                found[filled[place]] = sum(each.total for each in answers)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stop strings."""
        asked = [(self._writing(request.args[0], request.args[1], number),) for number, request in enumerate(requests)]
        found = {number: answers[0].text for batch in answer(self._model.network, asked) for number, answers in batch}
        return [found[number] for number in range(len(asked))]

    def _writing(self, context: str, settings: dict[str, Any], number: int) -> Writing:
        settings = normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        for name in settings.keys() - _HONOURED:
            if name not in _WITHOUT_EFFECT or settings[name] not in (_WITHOUT_EFFECT[name], None):
                raise UserError(
                    f"lm-eval's task asks for {name}={settings[name]!r}, which is not known here; set it with a task of your own"
                )
        ids, count = self.tok_encode(context), int(settings["max_gen_toks"])
        room = self.max_length - count
        if room < 1:
            raise UserError(
                f"lm-eval's task asks for {count:,} new tokens, the model's context is {self.max_length:,}; lower max_gen_toks"
            )
        self.cut += len(ids) > room
        return Writing(
            tuple(ids[-room:]),
            count,
            tuple(text for text in settings.get("until", []) if text),
            float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0,
            float(settings.get("top_p") or 1.0),
            number,
        )
