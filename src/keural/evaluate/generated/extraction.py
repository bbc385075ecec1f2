"""What is taken out of an answer, and whether it is right.

In: the text of an answer, the ways of a task. Out: the extracted answer by each way, and whether it equals a right one. Verdicts
are those of lm-eval's filters and its exact match, for the same expressions.
"""

import re
import string
from collections.abc import Sequence

from keural.evaluate.generated.settings import ExtractionSpec, NormalizationSpec

NOTHING = "[invalid]"
"""Where the expression is not found."""
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def extract(way: ExtractionSpec, text: str) -> str:
    """The answer in a text; `NOTHING` where there is none."""
    if way.pattern is None:
        return text
    found = list(re.finditer(way.pattern, text))
    if not found:
        return NOTHING
    match = found[0 if way.take == "first" else -1]
    if not match.re.groups:
        return match.group().strip()
    return next((group for group in match.groups() if group), NOTHING if match.re.groups > 1 else "").strip()


def normalize(rules: NormalizationSpec, text: str) -> str:
    """A text as it is compared."""
    for pattern in rules.ignore:
        text = re.sub(pattern, "", text)
    if rules.ignore_case:
        text = text.lower()
    if rules.ignore_punctuation:
        text = text.translate(_WITHOUT_PUNCTUATION)
    return " ".join(text.split()) if rules.ignore_spaces else text


def is_right(rules: NormalizationSpec, answer: str, accepted: Sequence[str]) -> bool:
    """Whether an extracted answer equals one of those that count as right."""
    given = normalize(rules, answer)
    return any(given == normalize(rules, right) for right in accepted)
