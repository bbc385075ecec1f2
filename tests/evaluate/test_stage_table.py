"""The table of a run's stages: who is asked what and how, what is kept, and what counts as a change."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keural.errors import UserError
from keural.evaluate import toy_world
from keural.evaluate.bench import Bench
from keural.model import KeuralMoECausalLM
from keural.pretrained.directory import save_model_directory
from keural.recipe import OBJECTIVES, ExactMatchSpec
from keural.tokenizer import KeuralTokenizer
from tests.evaluate.test_scorecard import bench_of, recipe_of, stage

STAGES = [stage("read", "next_token"), stage("chat", "sft", "read"), stage("prefer", "dpo", "chat")]
SPEC = ExactMatchSpec(items_per_task=2, pairs=6, max_new_tokens=3)


def save_model(model: KeuralMoECausalLM, tokenizer: KeuralTokenizer, directory: Path, name: str) -> None:
    """As the model of one of these stages."""
    names = [one.name for one in STAGES]
    trained = [one.objective for one in STAGES[: names.index(name) + 1]] if name in names else ["sft"]
    assert set(trained) <= set(OBJECTIVES)
    save_model_directory(directory, model.config, model.state_dict(), tokenizer, {"objectives": trained})


@pytest.fixture
def bench(tokenizer: KeuralTokenizer, model: KeuralMoECausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """A run whose stages all have the same random model."""
    monkeypatch.setattr(Bench, "model", lambda self, name: model)
    for one in STAGES:
        save_model(model, tokenizer, tmp_path / one.name / "model", one.name)
    return bench_of(recipe_of(STAGES, exact_match=SPEC.model_dump()), tokenizer, model.config, tmp_path)


def lines_of(bench: Bench, table: dict[str, Any], name: str, task: str) -> list[dict[str, Any]]:
    """The kept lines of a model and a task, the header first."""
    file = bench.out / table[name]["tasks"][task]["items"]
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
            assert len(lines_of(bench, table, name, task)) == cell["n"] + 1
    assert "change" not in table["untrained"]["tasks"]["toy_facts_ko"]
    assert [table[name]["tasks"]["toy_facts_ko"]["change"]["against"] for name in ("read", "chat", "prefer")] == [
        "untrained",
        "read",
        "chat",
    ]


def test_models_of_documents_are_asked_in_a_document_and_others_in_a_chat(bench: Bench, tokenizer: KeuralTokenizer) -> None:
    table = toy_world.measure(bench, SPEC)["stages"]

    asked = {name: lines_of(bench, table, name, "toy_facts_en")[1]["question"] for name in ("untrained", "read", "chat", "prefer")}
    assert asked["read"] == asked["untrained"] == f"Question: {asked['chat']} Answer:"
    assert asked["chat"] == asked["prefer"]
    pair = toy_world.toy_tasks(SPEC, 42)[-1].items[0]
    asking = toy_world._with_answer(tokenizer, pair, "It is.", in_chat=False)  # type: ignore[arg-type]
    assert tokenizer.decode(asking.continuation[:-1]) == " It is."
    assert (asking.context[0], asking.continuation[-1]) == (tokenizer.bos_id, tokenizer.eos_id)


def test_what_was_measured_is_not_measured_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = toy_world.measure(bench, SPEC)

    def refuse(self: Bench, name: str) -> None:
        raise AssertionError(f"{name} is asked again")

    monkeypatch.setattr(Bench, "model", refuse)
    assert toy_world.measure(bench, SPEC) == first
    with pytest.raises(AssertionError, match="asked again"):
        toy_world.measure(bench, SPEC.model_copy(update={"max_new_tokens": 4}))


def test_other_weights_are_asked_anew(bench: Bench, model: KeuralMoECausalLM) -> None:
    toy_world.measure(bench, SPEC)
    shutil.rmtree(bench.out / "chat" / "model")
    other = copy.deepcopy(model)
    other.model.norm.weight.data += 1
    save_model(other, bench.tokenizer, bench.out / "chat" / "model", "chat")
    toy_world.measure(bench, SPEC)

    assert len(list((bench.out / "results").glob("chat-*"))) == 2
    assert len(list((bench.out / "results").glob("read-*"))) == 1


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text.replace('"score":0.0', '"score":1.0', 1), ":2: damaged"),
        (lambda text: "[]\n" + text, ":1: damaged"),
    ],
)
def test_damaged_results_are_refused_not_believed(bench: Bench, damage: Any, expected: str) -> None:
    toy_world.measure(bench, SPEC)
    (file,) = (bench.out / "results").glob("chat-*/toy_facts_ko-*.jsonl")
    file.write_text(damage(file.read_text()))

    with pytest.raises(UserError, match=expected):
        toy_world.measure(bench, SPEC)


def test_what_a_kill_left_of_results_is_completed(bench: Bench) -> None:
    first = toy_world.measure(bench, SPEC)
    (file,) = (bench.out / "results").glob("chat-*/toy_facts_ko-*.jsonl")
    whole = file.read_text()
    file.write_text(whole[:-20])

    assert toy_world.measure(bench, SPEC) == first
    assert file.read_text() == whole


def test_before_any_stage_is_finished_nothing_is_measured(bench: Bench) -> None:
    assert toy_world.measure(replace(bench, finished=[]), SPEC) == {}
