"""lm-eval on a model of this package, and this package's tasks in lm-eval: the same questions, the same figures. Offline."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed (`keural[eval]`)")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from keural.errors import UserError
from keural.evaluate.evaluation import evaluate
from keural.evaluate.harness.export import export_tasks
from keural.evaluate.harness.running import HarnessSettings, run_harness
from keural.evaluate.models import Conditions, EvaluatedModel, stored_model
from keural.evaluate.results.records import ItemResult, TaskResults
from keural.evaluate.tasks.loading import LoadedTask, load
from keural.evaluate.tasks.spec import TaskSpec

WORDS = [
    "the cat",
    "a small red house",
    "two blue birds",
    "고양이는 작은",
    "파란 새",
    "on Monday morning",
    "정원에서 봅니다",
    "eleven",
]
ROWS = [
    {
        "question": f"{WORDS[number % 8]} sees?",
        "a": WORDS[(number + 1) % 8],
        "b": WORDS[(number + 3) % 8],
        "right": number % 2,
        "text": f"{WORDS[number % 8]} {WORDS[(number * 3) % 8]} " * (1 + number % 4),
    }
    for number in range(8)
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `datasets` makes of files goes into the test's own directory."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a small set of each kind."""
    directory = tmp_path_factory.mktemp("sets")
    arc = [
        {
            "question": row["question"],
            "choices": {"text": [row["a"], row["b"]], "label": ["A", "B"]},
            "answerKey": "AB"[row["right"]],
        }
        for row in ROWS
    ]
    sums = [{"question": row["question"], "answer": f"#### {row['right']}"} for row in ROWS]
    for name, rows in {"arc": arc, "texts": [{"text": row["text"]} for row in ROWS], "sums": sums}.items():
        (directory / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return directory


SPECS: dict[str, dict[str, Any]] = {
    "arc": {"kind": "choice", "question": "Q: {{ question }}\nA:", "scoring": ["per_character", "sum"]},
    "texts": {"kind": "rolling", "places": [{"adapter": "documents", "path": "texts.jsonl"}]},
    "sums": {
        "kind": "generate",
        "question": "{{ asked }}",
        "generation": {
            "max_new_tokens": 12,
            "stop": ["e"],
            "extraction": [{"name": "strict"}, {"name": "flexible", "pattern": r"\w+", "take": "last"}],
            "normalization": {"ignore_case": True, "ignore_spaces": True},
        },
    },
}


@pytest.fixture(scope="module")
def tasks(data: Path) -> dict[str, LoadedTask]:
    adapters = {"arc": "arc", "texts": "text", "sums": "gsm8k"}
    found = {}
    for name, settings in SPECS.items():
        places = [{"adapter": adapters[name], "path": f"{name}.jsonl"}]
        spec = TaskSpec.model_validate({"name": name, "language": "en", **settings, "places": places})
        found[name] = load(spec, data)
    return found


@pytest.fixture(scope="module")
def evaluated(model_dir: Path) -> EvaluatedModel:
    return stored_model(model_dir, Conditions(dtype="float32"))


@pytest.fixture(scope="module")
def exported(tasks: dict[str, LoadedTask], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "tasks"
    assert export_tasks(list(tasks.values()), out) == {}
    return out


@pytest.fixture(scope="module")
def both(
    tasks: dict[str, LoadedTask], exported: Path, evaluated: EvaluatedModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[TaskResults, TaskResults]]:
    """Each task as this package asks it, and as lm-eval asks it of the same model."""
    results = tmp_path_factory.mktemp("results")
    theirs = run_harness([f"keural_{name}" for name in tasks], evaluated, results, HarnessSettings(include=exported))
    assert theirs.cut == 0
    return {name: (evaluate(evaluated, task, results).results, theirs.tasks[f"keural_{name}"][0]) for name, task in tasks.items()}


def pairs(both: dict[str, tuple[TaskResults, TaskResults]], name: str) -> list[tuple[ItemResult, ItemResult]]:
    ours, theirs = both[name]
    assert len(ours.items) == len(theirs.items) == len(ROWS)
    return list(zip(ours.items, theirs.items, strict=True))


def test_choices_have_the_same_log_probabilities_and_scores(both: dict[str, tuple[TaskResults, TaskResults]]) -> None:
    for ours, theirs in pairs(both, "arc"):
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-5)
        assert theirs.details["scores"] == {"acc,none": ours.details["scores"]["sum"], "acc_norm,none": ours.score}
        assert theirs.question == ours.question
        assert theirs.expected.strip() == ours.expected
    assert both["arc"][1].chance == 0.5


def test_texts_take_as_many_bits_but_for_their_end(
    both: dict[str, tuple[TaskResults, TaskResults]], evaluated: EvaluatedModel
) -> None:
    from keural.evaluate.tasks.items import Likelihood

    asking = evaluated.asking
    for ours, theirs in pairs(both, "texts"):
        ids = [asking.tokenizer.bos_id, *asking.tokenizer.encode(ours.question)]
        end = Likelihood(tuple(ids), (asking.tokenizer.eos_id,))
        (((_, (paid,)),),) = evaluated.network.likelihoods([[end]])
        assert theirs.score == pytest.approx(ours.score + paid.total / math.log(2), abs=1e-3)
        assert theirs.details["bytes"] == ours.details["bytes"]


def test_answers_are_the_same_and_judged_alike(both: dict[str, tuple[TaskResults, TaskResults]]) -> None:
    for ours, theirs in pairs(both, "sums"):
        assert theirs.details["answers"] == ours.details["answers"]
        assert theirs.details["scores"] == {f"exact_match,{name}": score for name, score in ours.details["scores"].items()}
    assert any(answer for ours, _ in pairs(both, "sums") for answer in ours.details["answers"])


def test_a_chat_is_rendered_by_ids_on_both_sides(
    tasks: dict[str, LoadedTask], exported: Path, model_dir: Path, tmp_path: Path
) -> None:
    model = stored_model(model_dir, Conditions("chat", system="Be brief."))
    theirs = run_harness(["keural_arc", "keural_sums"], model, tmp_path, HarnessSettings(include=exported))
    for name in ("arc", "sums"):
        ours = evaluate(model, tasks[name], tmp_path).results
        for mine, other in zip(ours.items, theirs.tasks[f"keural_{name}"][0].items, strict=True):
            assert other.details.get("answers") == mine.details.get("answers")
            assert (other.logprobs or ()) == pytest.approx(mine.logprobs or (), abs=1e-5)


def test_the_hf_model_of_lm_eval_stays_known_and_agrees(
    both: dict[str, tuple[TaskResults, TaskResults]], exported: Path, model_dir: Path
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import keural.registration  # noqa: F401

    manager = TaskManager(include_path=str(exported), include_defaults=False)
    settings = {"pretrained": str(model_dir), "add_bos_token": True, "dtype": "float32"}
    found = simple_evaluate("hf", settings, ["keural_arc"], batch_size=4, bootstrap_iters=0, task_manager=manager, device="cpu")
    assert found is not None
    samples = sorted(found["samples"]["keural_arc"], key=lambda sample: sample["doc_id"])
    for (ours, _), sample in zip(pairs(both, "arc"), samples, strict=True):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == pytest.approx(ours.logprobs, abs=1e-4)


def test_what_was_computed_is_not_computed_again(exported: Path, model_dir: Path, tmp_path: Path) -> None:
    settings, names = HarnessSettings(include=exported, limit=3), ["keural_arc"]
    first = run_harness(names, stored_model(model_dir, Conditions()), tmp_path, settings)
    unread = stored_model(model_dir, Conditions())
    again = run_harness(names, unread, tmp_path, settings)
    assert (first.computed, again.computed) == (1, 0)
    assert again.tasks == first.tasks
    assert "network" not in vars(unread)
    assert len(again.tasks["keural_arc"][0].items) == 3
    whole = run_harness(names, unread, tmp_path, HarnessSettings(include=exported))
    assert whole.computed == 1
    assert len(whole.tasks["keural_arc"][0].items) == len(ROWS)
    assert whole.tasks["keural_arc"][0].items[:3] == first.tasks["keural_arc"][0].items


def test_lm_eval_in_another_process_than_the_first_is_refused(
    exported: Path, evaluated: EvaluatedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="without torchrun"):
        run_harness(["keural_arc"], evaluated, tmp_path, HarnessSettings(include=exported, limit=1))


@pytest.mark.slow  # lm-eval reads its thousands of tasks
@pytest.mark.parametrize(
    ("name", "words"), [("kobest_cop", "did you mean 'kobest_copa'"), ("kmmlu_law", "lm-eval could not run kmmlu_law")]
)
def test_an_unknown_task_and_one_without_data_are_refused(name: str, words: str, evaluated: EvaluatedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        run_harness([name], evaluated, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_export_never_writes_over_anything(tasks: dict[str, LoadedTask], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        export_tasks(list(tasks.values()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
