"""The kind `generate` from a task's file to the result of an item: answers, instructions, programs, samples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keural.errors import UserError
from keural.evaluate.generated import kind
from keural.evaluate.results.records import ItemResult
from keural.evaluate.tasks.asking import Asking
from keural.evaluate.tasks.items import Unusable, Written
from keural.evaluate.tasks.library import select, shipped
from keural.evaluate.tasks.loading import LoadedTask, load
from keural.evaluate.tasks.spec import TaskSpec, read_task
from keural.tokenizer import KeuralTokenizer

SUM = {"question": "2 and 3? ", "answer": "2+3=<<2+3=5>>5\n#### 5"}
PROGRAM = {
    "task_id": "HumanEval/0",
    "prompt": '\n\ndef double(x):\n    """ twice x\n    """\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n",
}
INSTRUCTION = {
    "key": 1,
    "prompt": "Say yes in quotes without commas.",
    "instruction_id_list": ["en:startend:quotation", "en:punctuation:no_comma"],
    "kwargs": [{}, {}],
}
SETS: dict[str, tuple[str, Any]] = {
    "gsm8k": ("eval_gsm8k_test/test.jsonl", [SUM]),
    "bbh_zeroshot_navigate": (
        "eval_bbh/navigate.json",
        {"canary": "x", "examples": [{"input": "Back?\n- Yes\n- No", "target": "No"}]},
    ),
    "ifeval": ("eval_ifeval/en_input_data.jsonl", [INSTRUCTION]),
    "humaneval": ("eval_humaneval/HumanEval.jsonl.gz", [PROGRAM]),
}
Judge = Callable[..., ItemResult]


def loaded(name: str, data: Path, spec: TaskSpec | None = None, rows: Any = None) -> LoadedTask:
    """A shipped task on rows of its set's form, written as its set lies."""
    import gzip

    place, given = SETS[name]
    rows = given if rows is None else rows
    file = data / place
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if isinstance(rows, dict) else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if place.endswith(".gz") else text.encode())
    return load(spec or shipped()[name], data, 0)


def judged(task: LoadedTask, *texts: str, number: int = 0) -> ItemResult:
    """The result of an item for these samples, asked of a model with the test's tokenizer."""
    item = task.items[number]
    asked = [kind.Writing((1, 2, 3), 10)] * len(texts)
    return kind.judge(task.spec, item, asked, [Written(text, 4, "stop") for text in texts], {})


def changed(name: str, **generation: Any) -> TaskSpec:
    spec = shipped()[name]
    assert spec.generation is not None
    return TaskSpec.model_validate({**spec.model_dump(), "generation": {**spec.generation.model_dump(), **generation}})


def test_a_sum_is_right_by_its_last_line_or_its_last_number(tmp_path: Path) -> None:
    task = loaded("gsm8k", tmp_path)
    assert task.items[0].prompt == "Question: 2 and 3? \nAnswer:"
    assert judged(task, " 2+3=5\n#### 5").score == 1
    found = judged(task, "It is 5.")
    assert found.score == 0
    assert found.details["scores"] == {"strict": 0, "flexible": 1}
    assert found.details["extracted"] == {"strict": ["[invalid]"], "flexible": ["5."]}
    assert found.details["ends"] == ["stop"]
    assert found.tokens == 7


def test_an_example_shows_the_whole_answer(tmp_path: Path) -> None:
    other = {"question": "1 and 1?", "answer": "#### 2"}
    file = tmp_path / "eval_gsm8k_train" / "train.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps(other) + "\n")
    (tmp_path / "eval_gsm8k_test").mkdir()
    (tmp_path / "eval_gsm8k_test" / "test.jsonl").write_text(json.dumps(SUM) + "\n")
    task = load(shipped()["gsm8k"], tmp_path, 1)
    assert task.items[0].prompt == "Question: 1 and 1?\nAnswer: #### 2\n\nQuestion: 2 and 3? \nAnswer:"


def test_a_task_of_bbh_reads_the_list_inside_its_file(tmp_path: Path) -> None:
    task = loaded("bbh_zeroshot_navigate", tmp_path)
    assert task.items[0].prompt.endswith("starting point.\n\nQ: Back?\n- Yes\n- No\nA:")
    assert judged(task, " no.").details["scores"] == {"flexible": 1, "strict": 1}
    assert judged(task, "We end at No, so No").details["scores"] == {"flexible": 1, "strict": 0}
    assert judged(task, "Yes").score == 0


def test_instructions_are_judged_by_their_verifiers(tmp_path: Path) -> None:
    task = loaded("ifeval", tmp_path)
    assert judged(task, '"yes"').score == 1
    found = judged(task, '"yes, sir"')
    assert found.details["scores"] == {"strict": 0, "loose": 0, "instructions_strict": 0.5, "instructions_loose": 0.5}
    assert found.details["followed"]["strict"] == [[True, False]]
    assert judged(task, 'Sure:\n"yes"').details["scores"]["loose"] == 1


def test_a_row_whose_instructions_nobody_knows_is_counted(tmp_path: Path) -> None:
    bad = [
        {**INSTRUCTION, "instruction_id_list": ["no:such", "thing"]},
        {**INSTRUCTION, "kwargs": [{}]},
        {"prompt": "x"},
        INSTRUCTION,
    ]
    assert loaded("ifeval", tmp_path, rows=bad).left_out == {"bad_instructions": 2, "no_instructions": 1}
    with pytest.raises(UserError, match="unknown instruction 'no:such'"):
        loaded("ifeval", tmp_path, rows=bad[:1])


def test_a_program_passes_its_test_as_it_goes_on_or_in_fences(tmp_path: Path) -> None:
    task = loaded("humaneval", tmp_path)
    assert task.items[0].prompt == PROGRAM["prompt"]
    for text in (
        "    return 2 * x\n",
        "Here it is:\n```python\ndef double(x):\n    return x + x\n```\nDone.",
        "```\n    return x * 2\n```",
    ):
        assert judged(task, text).score == 1, text
    failed = judged(task, "    return 3 * x\n")
    assert failed.score == 0
    assert "AssertionError" in failed.details["why"][0]


def test_samples_of_a_program_give_pass_at_k(tmp_path: Path) -> None:
    spec = changed("humaneval", samples=4, temperature=0.2, pass_at=[1, 2])
    task = loaded("humaneval", tmp_path, spec)
    found = judged(task, *["    return 2 * x"] * 2, "    return", "oops")
    assert found.score == 0.5
    assert found.details["scores"] == {"pass@1": 0.5, "pass@2": pytest.approx(1 - 1 / 6)}
    assert found.details["passed"] == [True, True, False, False]


def test_korean_instructions_need_no_set(tokenizer: KeuralTokenizer) -> None:
    (spec,) = select(["ko_instructions"], None)
    task = load(spec, None)
    assert len(task.items) == 380
    assert task.digest == load(spec, None).digest
    other = spec.model_copy(update={"made": spec.made.model_copy(update={"seed": 1}) if spec.made else None})
    assert load(other, None).digest != task.digest
    one_of = next(number for number, item in enumerate(task.items) if '"form:one_of"' in item.values["instructions"])
    options = json.loads(task.items[one_of].values["arguments"])[0]["options"]
    assert judged(task, options[0], number=one_of).score == 1
    assert judged(task, f"{options[0]} 그렇게 생각합니다", number=one_of).score == 0


def test_requests_have_a_seed_for_each_sample_and_room_for_an_answer(tmp_path: Path, tokenizer: KeuralTokenizer) -> None:
    spec = changed("gsm8k", samples=3, temperature=1.0, max_new_tokens=50)
    item = loaded("gsm8k", tmp_path, spec).items[0]
    asked, details = kind.requests(spec, item, Asking(tokenizer, "bos", 4096))
    assert len({one.seed for one in asked}) == 3
    assert asked[0].prompt_ids == (tokenizer.bos_id, *tokenizer.encode(item.prompt))
    assert details == {}
    assert kind.requests(spec, item, Asking(tokenizer, "bos", 4096))[0] == asked
    length = len(asked[0].prompt_ids)
    assert kind.requests(spec, item, Asking(tokenizer, "bos", length + 20))[1] == {"room": 20}
    with pytest.raises(Unusable, match="too_long"):
        kind.requests(spec, item, Asking(tokenizer, "bos", length))
    chat = kind.requests(spec, item, Asking(tokenizer, "chat", 4096))[0][0].prompt_ids
    assert chat != asked[0].prompt_ids
    assert tokenizer.im_end_id in chat


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"generation": None}, "kind generate"),
        ({"kind": "choice"}, "kind generate"),
        ({"places": []}, "in places or made"),
        ({"made": {"by": "ko_instructions", "number": 3}}, "in places or made"),
        ({"generation": {"extraction": [{"name": "a", "pattern": "*"}]}}, "generation.extraction"),
    ],
)
def test_an_impossible_task_is_refused_by_its_file(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    settings = {**shipped()["gsm8k"].model_dump(exclude_defaults=True), **changes}
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    with pytest.raises(UserError, match=words) as refusal:
        read_task(file)
    assert str(file) in str(refusal.value)


@pytest.mark.slow
def test_the_sets_at_hand_are_asked_whole_and_their_own_answers_score_1(real_data: Path) -> None:
    counts = {
        "gsm8k": 1319,
        "ifeval": 541,
        "humaneval": 164,
        "bbh_zeroshot_word_sorting": 250,
        "bbh_zeroshot_causal_judgement": 187,
    }
    for name, count in counts.items():
        task = load(shipped()[name], real_data, 0)
        assert (len(task.items), task.left_out) == (count, {}), name
        if name == "humaneval":
            texts = [f"    {item.choices[0]}" for item in task.items]
        elif name == "ifeval":
            continue
        else:
            texts = [item.choices[0] for item in task.items]
        scores = [judged(task, text, number=number).score for number, text in enumerate(texts)]
        assert sum(scores) == count, (name, [number for number, score in enumerate(scores) if not score])
