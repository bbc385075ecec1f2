"""What is taken out of answers, beside lm-eval's filters and its exact match on as many answers as GSM8K has items."""

import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import yaml

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
    """One of an answer's forms."""
    return draw.choice(forms_of(gold, draw))


def forms_of(gold: str, draw: random.Random) -> list[str]:
    """An answer as a model may give it: right, wrong, cut, in other words, with units, signs, several results, or none."""
    number = gold.split("#### ")[1]
    wrong = str(int(re.sub(r"[^\d]", "", number)) + draw.choice([0, 1]))
    return [
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


@pytest.mark.slow
def test_every_answer_to_gsm8k_is_extracted_and_judged_as_by_lm_eval(real_data: Path) -> None:
    """The answers of the whole set in thirty forms each, by the expressions of lm-eval's own task file."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (`keural[eval]`)")
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    lines = (real_data / "eval_gsm8k_test" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    draw = random.Random(11)
    recorded = [(gold, text) for line in lines for gold in [json.loads(line)["answer"]] for text in forms_of(gold, draw)]
    settings = settings_of(shipped()["gsm8k"])
    options = {name: value for name, value in task["metric_list"][0].items() if name.startswith(("regexes", "ignore"))}
    for ours, theirs in zip(settings.extraction, task["filter_list"], strict=True):
        arguments = {name: value for name, value in theirs["filter"][0].items() if name != "function"}
        found = [one[0] for one in RegexFilter(**arguments).apply([[text] for _, text in recorded], [{}] * len(recorded))]
        assert [extract(ours, text) for _, text in recorded] == found
        right = [
            bool(exact_match_hf_evaluate([one], [gold], **options)["exact_match"])
            for one, (gold, _) in zip(found, recorded, strict=True)
        ]
        assert [is_right(settings.normalization, one, [gold]) for one, (gold, _) in zip(found, recorded, strict=True)] == right
        print(f"{len(recorded):,} answers, {ours.name}: {sum(right):,} right, {found.count(NOTHING):,} without an answer")


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
