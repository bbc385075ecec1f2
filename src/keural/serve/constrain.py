"""Answers of a given form: JSON of a schema, text of a regular expression or of a grammar.

In: what an answer must be. Out: a constraint that says of every token whether it may come next. llguidance does the work; it is
imported when it is first asked for, and reads the tokenizer then, which takes seconds with a large one.
"""

import json
import re
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keural.errors import UserError
from keural.tokenizer import KeuralTokenizer

SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line, as Python writes it: a model that may put blanks anywhere can go on doing so without end."""
OPTIONS = "x-guidance"
"""Key of a schema by which llguidance is told how to follow it; in JSON Schema it means nothing."""
FUEL = 200_000
"""Work that a form may cost before its first token: about a second."""
LONGEST_REASON = 400
BITS = 32
_OUR_GRAMMAR = re.compile(r"^at \d+\(\d+\): |^ +\d+ \| .*\n?( *\^ *$)?", re.MULTILINE)
"""In the library's words: a place in a grammar, and the lines around it."""


class Grammars:
    """Makes constraints for the tokens of one tokenizer."""

    def __init__(self, tokenizer: KeuralTokenizer) -> None:
        self._tokenizer = tokenizer
        self._read: Any = None
        self._lock = threading.Lock()

    def json(self, schema: Mapping[str, Any]) -> "Form":
        """JSON that a schema describes. Raises `UserError` for one that cannot be followed."""
        matcher = _library().LLMatcher
        return self._form(matcher.grammar_from_json_schema(json.dumps(schema), overrides=SEPARATORS), "the JSON schema")

    def regex(self, pattern: str) -> "Form":
        """Text that an expression matches as a whole. Raises `UserError`."""
        return self._form(_library().LLMatcher.grammar_from_regex(pattern), "the regular expression")

    def lark(self, grammar: str, what: str) -> "Form":
        """Text of a grammar in the library's Lark; `what` it stands for. Raises `UserError`."""
        return self._form(_library().LLMatcher.grammar_from_lark(grammar), what)

    def _form(self, grammar: str, what: str) -> "Form":
        library = _library()
        matcher = library.LLMatcher(self._tokens(), grammar, log_level=0, limits=library.LLParserLimits(initial_lexer_fuel=FUEL))
        if matcher.is_error():
            raise UserError(f"{what} cannot be followed: {_reason(matcher)}")
        form = Form(matcher, self._tokenizer.vocab_size, self._tokenizer.im_end_id)
        form.allowed()
        if form.failure is not None:
            raise UserError(f"{what} cannot be followed: {form.failure}")
        return form

    def _tokens(self) -> Any:
        """The tokenizer as the library takes it."""
        with self._lock:
            if self._read is None:
                self._read = _library().LLTokenizer(_Words(self._tokenizer))
            return self._read


class Form:
    """What may come next in one answer; a `Constraint`. It never raises: `failure` says what went wrong, and the answer ends."""

    def __init__(self, matcher: Any, vocab_size: int, end: int) -> None:
        self._matcher, self._size, self._end = matcher, vocab_size, end
        self._mask = np.zeros((vocab_size + BITS - 1) // BITS, dtype=np.int32)
        self.failure: str | None = None
        self.asked: Mapping[str, Any] = {}
        """The form in words that other engines know, where there are any: `json`, `regex`, `choice`, or of calls
        `grammar` and `structural_tag`."""

    def fresh(self) -> "Form":
        """The same from the start, for another answer."""
        form = Form(self._matcher.deep_copy(), self._size, self._end)
        form.asked = self.asked
        return form

    def allowed(self) -> NDArray[np.bool_]:
        """See `Constraint.allowed`."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._size].astype(bool)
        if self._matcher.is_error() or not allowed.any():
            self.failure = _reason(self._matcher) or "nothing can follow"
            allowed[:] = False
            allowed[self._end] = True
        return allowed

    def take(self, token: int) -> None:
        """See `Constraint.take`."""
        self._matcher.consume_token(token)


class _Words:
    """What the library wants to know of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: KeuralTokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.im_end_id, tokenizer.bos_id
        self.special_token_ids = [
            tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.im_start_id, tokenizer.im_end_id,
        ]  # fmt: skip
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        for token in self.special_token_ids:
            self.tokens[token] = tokenizer.decode([token], skip_special_tokens=False).encode()

    def __call__(self, text: str | bytes) -> list[int]:
        """The ids of a text."""
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _reason(matcher: Any) -> str:
    """What the library says is wrong, without its inner state and without the grammar that was made of what was asked."""
    found: str = matcher.get_error().partition("<state>")[0]
    return _OUR_GRAMMAR.sub("", found).strip()[:LONGEST_REASON]


def _library() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise UserError("answers of a given form need llguidance; install it with `pip install 'keural[serve]'`") from error
    return llguidance
