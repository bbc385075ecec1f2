"""What is taken out of answers, beside lm-eval's filters and its exact match on as many answers as GSM8K has items."""

import importlib.util
import random
import re

import pytest

from keural.evaluate.generated.extraction import NOTHING, extract, is_right, normalize
from keural.evaluate.generated.kind import settings_of
from keural.evaluate.generated.settings import ExtractionSpec, GenerationSpec, NormalizationSpec
from keural.evaluate.tasks.library import shipped

ITEMS = 1319


def gold_answers(seed: int) -> list[str]:
    """Answers of GSM8K's form: some lines of sums, and the result after four hashes."""
    draw = random.Random(seed)
    numbers = [
        draw.choice(
            [
                str(draw.randrange(1000)),
                f"{draw.randrange(1, 99)},{draw.randrange(1000):03d}",
                f"-{draw.randrange(9)}",
                f"{draw.randrange(99)}.5",
            ]
        )
        for _ in range(ITEMS)
    ]
    return [f"She has {draw.randrange(9)}*2=<<{number}={number}>>{number} of them.\n#### {number}" for number in numbers]


def perturbed(gold: str, draw: random.Random) -> str:
    """An answer as a model may give it: right, wrong, cut, in other words, with units, signs, several results, or none."""
    number = gold.split("#### ")[1]
    wrong = str(int(re.sub(r"[^\d]", "", number)) + draw.choice([0, 1]))
    forms = [
        gold,
        f" {gold}",
        gold.replace("#### ", "####"),
        gold.replace("####", "###"),
        gold[: len(gold) // 2],
        "",
        "I do not know.",
        f"#### {wrong}",
        f"The answer is {number}.",
        f"The answer is ${number}",
        f"{number} apples and {wrong} pears",
        f"#### {number}.",
        f"#### ${number}",
        f"#### {number}\n#### {wrong}",
        f"So 1/2 of it: {number}%",
        f"答えは{number}です",
        "...",
        "$",
        "-",
        f"= {number},",
        f"#### -{wrong}",
        "#### .",
        "#### ,,",
        f"#### {number} dollars\nQuestion",
        f"**{number}**",
        f"\\boxed{{{number}}}",
        f"{number}.00",
        f"３ {wrong}",
        "####  7",
        f"(#### {number})",
    ]
    return draw.choice(forms)


@pytest.fixture(scope="module")
def recorded() -> list[tuple[str, str]]:
    draw = random.Random(7)
    return [(gold, perturbed(gold, draw)) for gold in gold_answers(5)]


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("strict", {"regex_pattern": r"#### (\-?[0-9\.\,]+)"}),
        ("flexible", {"group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"}),
    ],
)
def test_extraction_and_verdicts_are_those_of_lm_eval(recorded: list[tuple[str, str]], way: str, options: dict) -> None:  # type: ignore[type-arg]
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed (`keural[eval]`)")
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    settings = settings_of(shipped()["gsm8k"])
    ours = next(each for each in settings.extraction if each.name == way)
    texts = [text for _, text in recorded]
    theirs = [found[0] for found in RegexFilter(**options).apply([[text] for text in texts], [{}] * ITEMS)]
    assert [extract(ours, text) for text in texts] == theirs
    assert theirs.count(NOTHING) > 50
    ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
    right = [
        bool(exact_match_hf_evaluate([found], [gold], regexes_to_ignore=ignored, ignore_case=True)["exact_match"])
        for found, (gold, _) in zip(theirs, recorded, strict=True)
    ]
    assert [is_right(settings.normalization, extract(ours, text), [gold]) for gold, text in recorded] == right
    assert 100 < sum(right) < ITEMS - 100


@pytest.mark.parametrize(
    ("pattern", "take", "text", "found"),
    [
        (None, "first", " as it is ", " as it is "),
        (r"\d+", "first", "7 or 8", "7"),
        (r"\d+", "last", "7 or 8", "8"),
        (r"is (\w+)", "first", "it is  no; it is yes", "yes"),
        (r"(a)|(b)", "last", "a b", "b"),
        (r"(a?)(b?)c", "first", "c", NOTHING),
        (r"(x*)y", "first", "y", ""),
        (r"\d+", "first", "none", NOTHING),
    ],
)
def test_the_first_group_with_text_counts(pattern: str | None, take: str, text: str, found: str) -> None:
    assert extract(ExtractionSpec(name="one", pattern=pattern, take=take), text) == found  # type: ignore[arg-type]


def test_normalization_takes_out_what_does_not_count() -> None:
    rules = NormalizationSpec(ignore=[r"\.$"], ignore_case=True, ignore_punctuation=True, ignore_spaces=True)
    assert normalize(rules, "  The\n ANSWER, yes. ") == "the answer yes"
    assert is_right(rules, "Yes.", ["no", "yes"])
    assert not is_right(NormalizationSpec(), "Yes.", ["no", "yes"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"extraction": [{"name": "x", "pattern": "("}]}, "no regular expression"),
        ({"normalization": {"ignore": ["["]}}, "no regular expression"),
        ({"extraction": [{"name": "x"}, {"name": "x"}]}, "same name"),
        ({"extraction": []}, "at least 1"),
        ({"stop": [""]}, "end of nothing"),
        ({"samples": 4}, "give a temperature"),
        ({"verifier": "ifevil"}, "use one of"),
        ({"verifier": "ifeval", "code": True}, "judged by its tests"),
        ({"samples": 2, "temperature": 0.5, "pass_at": [1, 4]}, "up to the 2 samples"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
        ({"temperature": float("inf")}, "finite"),
        ({"stops": []}, "not permitted"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=words):
        GenerationSpec.model_validate(settings)
