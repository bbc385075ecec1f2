"""The table of a run's stages: who is asked what and how, what is kept, and what counts as a change."""

import json
from pathlib import Path
from typing import Any

import pytest

from keural.errors import UserError
from keural.evaluate import toy_world
from keural.evaluate.bench import Bench
from keural.evaluate.results.records import ItemResult, TaskResults
from keural.evaluate.stage_table import changes
from keural.model import KeuralMoECausalLM
from keural.recipe import ExactMatchSpec
from keural.tokenizer import KeuralTokenizer
from tests.evaluate.test_scorecard import bench_of, recipe_of, stage

STAGES = [stage("read", "next_token"), stage("chat", "sft", "read"), stage("prefer", "dpo", "chat")]
SPEC = ExactMatchSpec(items_per_task=2, pairs=6, max_new_tokens=3)


@pytest.fixture
def bench(tokenizer: KeuralTokenizer, model: KeuralMoECausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """A run whose stages all have the same random model."""
    monkeypatch.setattr(Bench, "model", lambda self, name: model)
    for one in STAGES:
        (tmp_path / one.name / "model").mkdir(parents=True)
    return bench_of(recipe_of(STAGES, exact_match=SPEC.model_dump()), tokenizer, model.config, tmp_path)


def results_in(bench: Bench, name: str, task: str) -> list[dict[str, Any]]:
    """The kept lines of a model and a task, the header first."""
    (file,) = (bench.out / "results").glob(f"{name}-*/{task}-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_stage_and_the_untrained_model_are_measured_on_every_task_in_both_languages(bench: Bench) -> None:
    table = toy_world.measure(bench, SPEC)["stages"]

    assert list(table) == ["untrained", "read", "chat", "prefer"]
    families = ("arithmetic", "translation", "facts", "rewriting", "smalltalk", "preferences")
    for name, row in table.items():
        assert list(row["tasks"]) == [f"toy_{family}_{language}" for family in families for language in ("ko", "en")]
        for task, cell in row["tasks"].items():
            assert cell["low"] <= cell["score"] <= cell["high"]
            assert cell["chance"] == (0.5 if "preferences" in task else 0.0)
            assert len(results_in(bench, name, task)) == cell["n"] + 1
            assert (bench.out / cell["items"]).is_file()
    assert "change" not in table["untrained"]["tasks"]["toy_facts_ko"]
    assert [table[name]["tasks"]["toy_facts_ko"]["change"]["from"] for name in ("read", "chat", "prefer")] == [
        "untrained",
        "read",
        "chat",
    ]


def test_models_of_documents_are_asked_in_a_document_and_others_in_a_chat(bench: Bench, tokenizer: KeuralTokenizer) -> None:
    toy_world.measure(bench, SPEC)

    asked = {name: results_in(bench, name, "toy_facts_en")[1]["question"] for name in ("untrained", "read", "chat", "prefer")}
    assert asked["read"] == asked["untrained"] == f"Question: {asked['chat']} Answer:"
    assert asked["chat"] == asked["prefer"]
    pair = toy_world.toy_tasks(SPEC, 42)[-1].items[0]
    ids, places = toy_world._with_answer(tokenizer, pair, "It is.", in_chat=False)  # type: ignore[arg-type]
    assert tokenizer.decode(ids[places[0] : -1]) == " It is."
    assert (ids[0], ids[-1], places[-1]) == (tokenizer.bos_id, tokenizer.eos_id, len(ids) - 1)


def test_what_was_measured_is_not_measured_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = toy_world.measure(bench, SPEC)

    def refuse(self: Bench, name: str) -> None:
        raise AssertionError(f"{name} is asked again")

    monkeypatch.setattr(Bench, "model", refuse)
    assert toy_world.measure(bench, SPEC) == first
    with pytest.raises(AssertionError, match="asked again"):
        toy_world.measure(bench, SPEC.model_copy(update={"max_new_tokens": 4}))


def test_other_weights_are_asked_anew(bench: Bench) -> None:
    toy_world.measure(bench, SPEC)
    (bench.out / "chat" / "model" / "model.safetensors").write_bytes(b"other weights")
    toy_world.measure(bench, SPEC)

    assert len(list((bench.out / "results").glob("chat-*"))) == 2
    assert len(list((bench.out / "results").glob("read-*"))) == 1


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text.replace('"score": 0.0', '"score": 1.0', 1), "line 2 is damaged"),
        (lambda text: text[: text.rstrip().rindex("\n") + 1], "lines are missing"),
        (lambda text: "", "lines are missing"),
        (lambda text: text[:-20], "line 2 is damaged"),
        (lambda text: "[]\n" + text, "line 1 is damaged"),
    ],
)
def test_damaged_results_are_refused_not_believed(bench: Bench, damage: Any, expected: str) -> None:
    toy_world.measure(bench, SPEC)
    (file,) = (bench.out / "results").glob("chat-*/toy_facts_ko-*.jsonl")
    file.write_text(damage(file.read_text()))

    with pytest.raises(UserError, match=expected):
        toy_world.measure(bench, SPEC)


def results(task: str, scores: dict[str, float]) -> TaskResults:
    items = [ItemResult(name, None, score, "q", "a", "g", None, 1) for name, score in scores.items()]
    return TaskResults(task, "en", "generate", 0.0, "d", items)


def test_a_change_is_marked_only_where_it_is_significant_among_all_tasks() -> None:
    half = {str(number): float(number % 2) for number in range(60)}
    before = [results(f"t{number}", half) for number in range(10)]
    better = [results("t0", dict.fromkeys(half, 1.0)), *(results(f"t{number}", half) for number in range(1, 9))]
    slightly = results("t9", half | {str(number): 1.0 for number in range(0, 14, 2)})  # 7 gained, none lost: p is 1/64 by itself

    found = changes(before, [*better, slightly])
    assert (found["t0"]["significant"], found["t0"]["difference"]) == (True, 0.5)
    assert (found["t9"]["gained"], found["t9"]["lost"]) == (7, 0)
    assert not found["t9"]["significant"]
    assert changes(before[9:], [slightly])["t9"]["significant"]
    assert found["t1"]["p"] == 1.0


def test_only_items_that_both_were_asked_are_compared() -> None:
    found = changes([results("t", {"a": 0.0, "b": 0.0})], [results("t", {"b": 1.0, "c": 1.0}), results("new", {"a": 1.0})])

    assert (found["t"]["gained"], found["t"]["lost"], list(found)) == (1, 0, ["t"])
