"""The 25 kinds of IFEval (Zhou et al. 2023, table 1), by the names and arguments of its published rows.

In: an answer and arguments. Out: whether it follows. Verdicts are those of the published checks, four things aside: languages and
sentences are found by rules of our own (`languages`, `english`), a keyword is a text and not an expression, and a letter frequency
of `#` or `!` counts that sign, where the published check draws a random letter instead.
"""

import re
from collections.abc import Sequence

from keural.evaluate.verifiers.base import Registry, compare
from keural.evaluate.verifiers.english import capital_words, sentences
from keural.evaluate.verifiers.languages import language_of
from keural.parsing import Malformed, parse_json

_FENCES = ("```json", "```Json", "```JSON", "```")
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_WORD_ENDS = frozenset(".,?!'\"")


def _existence(answer: str, keywords: Sequence[str]) -> bool:
    return all(re.search(re.escape(keyword), answer, re.IGNORECASE) for keyword in keywords)


def _frequency(answer: str, keyword: str, frequency: int, relation: str) -> bool:
    return compare(len(re.findall(re.escape(keyword.strip()), answer, re.IGNORECASE)), relation, frequency)


def _forbidden_words(answer: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(answer: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(answer.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _response_language(answer: str, language: str) -> bool:
    return language_of(answer) in (None, language)


def _number_sentences(answer: str, num_sentences: int, relation: str) -> bool:
    return compare(sentences(answer), relation, num_sentences)


def number_paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Whether `***` divides the answer into so many paragraphs; dividers may stand at its ends, none may follow another."""
    parts = [part.strip() for part in re.split(r"\s?\*{3}\s?", answer)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def number_words(answer: str, num_words: int, relation: str) -> bool:
    """Words are runs of letters, digits and underscores."""
    return compare(len(re.findall(r"\w+", answer)), relation, num_words)


def nth_paragraph_first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Whether blank lines divide the answer into so many paragraphs, and the nth begins with the word, its punctuation aside."""
    parts = answer.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    words = parts[nth_paragraph - 1].split() if nth_paragraph <= count else []
    if not words:
        return False
    word = words[0].lstrip("'").lstrip('"').lower()
    end = next((place for place, letter in enumerate(word) if letter in _WORD_ENDS), len(word))
    return count == num_paragraphs and word[:end] == first_word.lower()


def number_placeholders(answer: str, num_placeholders: int) -> bool:
    """At least so many square brackets with something or nothing between them on a line."""
    return sum(map(_placeholders, answer.split("\n"))) >= num_placeholders


def _placeholders(line: str) -> int:
    """How many brackets a line opens and closes again; one inside another is the same."""
    count, end = 0, -1
    while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
        count += 1
    return count


def postscript(answer: str, postscript_marker: str) -> bool:
    """Whether the marker stands anywhere; spaces may follow its periods."""
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = postscript_marker.strip()
    return re.search(known.get(marker, re.escape(marker.lower())), answer.lower()) is not None


def number_bullet_lists(answer: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with `-`, or with one asterisk and no second."""
    dashes = re.findall(r"^\s*-.*", answer, re.MULTILINE)
    stars = re.findall(r"^\s*\*[^*].*", answer, re.MULTILINE)
    return len(dashes) + len(stars) == num_bullets


def constrained_response(answer: str) -> bool:
    """Whether one of the three answers that IFEval allows stands in it."""
    return any(option in answer for option in _CONSTRAINED)


def number_highlighted_sections(answer: str, num_highlights: int) -> bool:
    """At least so many pieces of a line between asterisks; what stands between two pairs counts as bold, and where these touch."""
    single = [found for found in re.findall(r"\*([^\n*]*)\*", answer) if found.strip()]
    double = [found for found in re.findall(r"\*\*([^\n*]*)\*\*", answer) if found.strip()]
    return len(single) + len(double) >= num_highlights


def multiple_sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many places where the section's word stands before a number."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d", answer)) >= num_sections


def json_format(answer: str) -> bool:
    """Whether the whole answer is JSON, perhaps in a fence of Markdown."""
    text = answer.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        parse_json(text.removesuffix("```").strip())
    except Malformed:
        return False
    return True


def title(answer: str) -> bool:
    """Whether a line has something between `<<` and `>>`."""
    titles = (
        line[line.find("<<") : line.rfind(">>") + 2] for line in answer.split("\n") if 0 <= line.find("<<") < line.rfind(">>") - 2
    )
    return any(found.lstrip("<").rstrip(">").strip() for found in titles)


def two_responses(answer: str) -> bool:
    """Two different answers with six asterisks between them; these may stand at the ends, too."""
    parts = [part.strip() for part in answer.split("*" * 6)]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def _repeat_prompt(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(answer: str, end_phrase: str) -> bool:
    """Whether the answer ends with the phrase; double quotes around the answer do not count."""
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_word_frequency(answer: str, capital_frequency: int, capital_relation: str) -> bool:
    return compare(capital_words(answer), capital_relation, capital_frequency)


def _english_capital(answer: str) -> bool:
    return answer.isupper() and language_of(answer) == "en"


def _english_lowercase(answer: str) -> bool:
    return answer.islower() and language_of(answer) == "en"


def no_comma(answer: str) -> bool:
    """No comma anywhere."""
    return "," not in answer


def quotation(answer: str) -> bool:
    """Whether the answer begins and ends with a double quote."""
    text = answer.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


IFEVAL: Registry = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""IFEval's kinds by its names."""
