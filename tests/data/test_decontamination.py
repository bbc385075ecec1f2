"""Evaluation items are found wherever they stand and however they are spaced; other text is not; what was found is listed."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keural.data.adapters import evaluation
from keural.data.filtering.decontamination import check_evaluation, open_evaluation
from keural.data.filtering.ngram_index import MIN_WEIGHT, ContaminationIndex, weight_of
from keural.data.prepare import prepare
from keural.data.records import EvaluationItem
from keural.errors import UserError
from keural.recipe import DataSpec, DecontaminateSpec, SourceSpec
from keural.tokenizer import KeuralTokenizer

QUESTION = (
    "If a train leaves the old harbour at nine and travels for three hours, which of the towns on the map has it passed by noon?"
)
KOREAN = "구한말 통영의 바닷가 마을에 살던 두 형제 가운데 약국을 경영하며 부를 누린 사람은 형과 동생 중에서 누구였는지 고르시오."
PROSE = (
    "바람이 불었다. 배는 천천히 항구를 떠났고, 사람들은 말없이 손을 흔들었다.\n\nThe rest of the day was quiet, and nobody spoke.\n"
)


def index(*items: EvaluationItem, **settings: Any) -> ContaminationIndex:
    return ContaminationIndex([("set", item) for item in items], **settings)


@pytest.mark.parametrize("text", [QUESTION, KOREAN])
@pytest.mark.parametrize(
    "change", [str, str.upper, lambda text: text.replace(" ", "\n  "), lambda text: text.replace(",", " —").replace(" ", "")]
)
def test_a_planted_item_is_found_however_it_is_written(text: str, change: Any) -> None:
    hit = index(EvaluationItem(text, "test:1")).find(PROSE + change(text) + PROSE)
    assert hit is not None
    assert (hit.set, hit.item, hit.share) == ("set", "test:1", 1.0)
    assert index(EvaluationItem(text, "test:1")).find(PROSE) is None


def test_thirteen_words_are_enough_and_twelve_are_not() -> None:
    words = [f"w{letter}x" for letter in "abcdefghijklmnopqrst"]
    found = index(EvaluationItem(" ".join(words), "test:1"))
    assert found.find(" ".join(words[3:16])) == ("set", "test:1", 1, 1 / 8, " ".join(words[3:16]))
    assert found.find(" ".join(words[3:15])) is None
    assert found.find(" ".join(words[3:16]), min_share=0.5) is None


def test_a_short_question_is_found_whole_or_with_its_choices() -> None:
    short = index(EvaluationItem("Which is red?", "test:1", choices=("a ripe tomato", "the deep blue sea", "fresh snow")))
    assert short.find("Which is red?") is None
    for labels in (("", "", ""), ("A. ", "B. ", "C. "), ("① ", "② ", "③ ")):
        choices = zip(labels, ("a ripe tomato", "the deep blue sea", "fresh snow"), strict=True)
        assert short.find(PROSE + "Which is red?\n" + "\n".join(label + choice for label, choice in choices) + PROSE)


def test_what_is_too_short_is_counted() -> None:
    built = index(EvaluationItem("좋아요", "test:7"), EvaluationItem(QUESTION, "test:8"))
    assert weight_of("좋아요") < MIN_WEIGHT
    assert (built.items["set"], built.too_short["set"], built.first_too_short["set"]) == (2, 1, "test:7")


def test_passages_can_be_kept() -> None:
    item = EvaluationItem("Who was it?", "test:1", passage=QUESTION)
    assert index(item).find(QUESTION)
    assert index(item, passages=False).find(QUESTION) is None


def test_an_item_is_found_across_blocks() -> None:
    rng = np.random.default_rng(0)
    filler = "".join(chr(97 + letter) for letter in rng.integers(0, 26, 65_500))
    for cut in range(0, 60, 7):
        assert index(EvaluationItem(QUESTION, "test:1")).find(filler[cut:] + QUESTION + filler)


def test_the_index_can_be_pickled_and_is_small() -> None:
    built = index(*(EvaluationItem(f"{QUESTION} {number} " * 4, f"test:{number}") for number in range(300)))
    assert built.num_bytes < 71 * built.num_ngrams + 2048
    assert pickle.loads(pickle.dumps(built)).find(QUESTION) == built.find(QUESTION)


ROWS: dict[str, dict[str, Any]] = {
    "kmmlu": {"question": "q", "answer": 1, "A": "a", "B": "b", "C": "c", "D": "d", "Category": "x"},
    "haerae": {"query": "q", "options": ["a", "b"], "answer": "(A)"},
    "click": {"id": "1", "paragraph": "p", "question": "q", "choices": ["a", "b"], "answer": "a"},
    "kornat": {"Question": "q", "A": "a", "B": "b", "C": "c", "D": "d", "E": "e", "Answer": "A"},
    "mmlu": {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0},
    "arc": {"id": "1", "question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "hellaswag": {"ctx": "q", "endings": ["a", "b", "c", "d"], "label": "0"},
    "gsm8k": {"question": "q", "answer": "a #### 1"},
    "truthfulqa_mc": {"question": "q", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]}},
    "mmlu_prompts": {"input": "The following are multiple choice questions (with answers) about x.\n\nq\nA. a\nB. b\nAnswer:"},
    "numbered_choices": {"instruction": "Please choose: q\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"},
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_published_schemas(name: str) -> None:
    item = evaluation.ADAPTERS[name](ROWS[name], SourceSpec(name="s", adapter=name), "file:1")
    assert isinstance(item, EvaluationItem)
    assert item.question == "q"
    assert "a" in (*item.choices, *item.answers) or name == "gsm8k"


def sets(tmp_path: Path, rows: list[Any]) -> DecontaminateSpec:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DecontaminateSpec(sources=[SourceSpec(name="gsm", adapter="gsm8k", path="test.jsonl")])


TURN = {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "two towns"}]}
CLEAN = {"conversations": [{"from": "human", "value": "what now?"}, {"from": "gpt", "value": "we wait for the train"}]}
PAIR = {"prompt": "tell me more", "chosen": "good answer", "rejected": QUESTION}
FINE = {"prompt": "what now?", "chosen": "we wait for it", "rejected": "we do not wait"}


@pytest.mark.parametrize(
    ("objective", "adapter", "rows"),
    [
        ("next_token", "text", [{"text": PROSE + QUESTION}, {"text": PROSE}]),
        ("sft", "sharegpt", [TURN, CLEAN]),
        ("dpo", "preference", [PAIR, FINE]),
    ],
)
@pytest.mark.parametrize("action", ["drop", "count", "skip"])
def test_records_of_every_kind(
    tmp_path: Path, tokenizer: KeuralTokenizer, objective: Any, adapter: str, rows: list[Any], action: Any
) -> None:
    spec = sets(tmp_path, [{"question": QUESTION, "answer": "#### 2"}])
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceSpec(name="train", adapter=adapter, path="train.jsonl", gates={"contaminated": action})
    made = prepare(
        DataSpec(sources=[source], sequence_length=600, decontaminate=spec), objective, tmp_path, tokenizer, tmp_path / "out", 1
    )
    (row,) = made.table
    assert row.drops == ({"contaminated": 1} if action == "drop" else {})
    assert row.noted == ({"contaminated": 1} if action == "count" else {})
    listed = [json.loads(line) for line in (made.train.parent / "contamination.jsonl").read_text().splitlines()]
    assert [(hit["source"], hit["where"], hit["set"], hit["item"]) for hit in listed] == (
        [] if action == "skip" else [("train", "train.jsonl:1", "gsm", "test.jsonl:1")]
    )
    assert made.contamination is not None
    assert made.contamination["gsm"]["records"] == len(listed)


def test_other_contents_of_an_evaluation_set_are_other_data(tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": PROSE}))
    source = SourceSpec(name="train", adapter="text", path="train.jsonl")
    made = []
    for question in (QUESTION, KOREAN):
        spec = DataSpec(sources=[source], sequence_length=64, decontaminate=sets(tmp_path, [{"question": question}]))
        made.append(prepare(spec, "next_token", tmp_path, tokenizer, tmp_path / "out", 1).fingerprint)
    assert made[0] != made[1]


def test_records_beyond_a_limit_are_not_counted(tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    spec = sets(tmp_path, [{"question": QUESTION}])
    rows = [{"text": f"{number} {PROSE}"} for number in range(9)] + [{"text": f"{number} {QUESTION}"} for number in range(30)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceSpec(name="train", adapter="text", path="train.jsonl", limit=5)
    made = prepare(
        DataSpec(sources=[source], sequence_length=64, decontaminate=spec), "next_token", tmp_path, tokenizer, tmp_path / "out", 1
    )
    assert (made.table[0].rows, made.table[0].kept) == (5, 5)
    assert made.contamination is not None
    assert made.contamination["gsm"]["records"] == 0
    assert (made.train.parent / "contamination.jsonl").read_text() == ""


def test_what_is_held_out_may_hold_evaluation_items(tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    spec = sets(tmp_path, [{"question": QUESTION}])
    for name, text in (("train", PROSE), ("held", QUESTION)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}))
    train, held = (SourceSpec(name=name, adapter="text", path=f"{name}.jsonl") for name in ("train", "held"))
    data = DataSpec(sources=[train], heldout_sources=[held], sequence_length=64, decontaminate=spec)
    made = prepare(data, "next_token", tmp_path, tokenizer, tmp_path / "out", 1)
    assert [(row.source, row.kept) for row in made.table] == [("train", 1), ("held", 1)]


@pytest.mark.parametrize(
    ("content", "adapter", "word"),
    [
        (None, "gsm8k", "no such file"),
        ("", "gsm8k", "empty"),
        ("\n\n", "gsm8k", "no rows"),
        ('{"prompt": "x"}\n', "gsm8k", "'question'"),
        ('{"text": "x"}\n', "text", "evaluation"),
        ('{"question": "x"}\n', "gsm8kk", "did you mean"),
    ],
)
def test_bad_evaluation_sets_are_refused(tmp_path: Path, content: str | None, adapter: str, word: str) -> None:
    if content is not None:
        (tmp_path / "test.jsonl").write_text(content)
    spec = DecontaminateSpec(sources=[SourceSpec(name="e", adapter=adapter, path="test.jsonl")])
    with pytest.raises(UserError, match=word) as caught:
        check_evaluation(open_evaluation(spec, tmp_path))
    assert "\n" not in str(caught.value)
