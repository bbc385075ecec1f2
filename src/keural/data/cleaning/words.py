"""Our ways to cut words, as datatrove's filters and MinHash take them."""

from collections.abc import Callable

from datatrove.utils.word_tokenizers import WordTokenizer

from keural.data.cleaning.measures import eojeol_words, plain_words


class Words(WordTokenizer):
    """A function from text to words; sentences, which no filter here asks for, are lines."""

    def __init__(self, cut: Callable[[str], list[str]]) -> None:
        super().__init__()
        self._cut = cut

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return self._cut(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """The lines of a text."""
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Where the lines of a text begin and end."""
        spans, start = [], 0
        for line in text.splitlines(keepends=True):
            spans.append((start, start + len(line)))
            start += len(line)
        return spans


EOJEOL = Words(eojeol_words)
PLAIN = Words(plain_words)
