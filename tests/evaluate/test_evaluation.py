"""A model asked a task from one end to the other: planted answers, shuffled labels, what is known already, what is too long."""

import gc
import random
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keural.errors import UserError
from keural.evaluate.evaluation import evaluate
from keural.evaluate.generated import kind as generated
from keural.evaluate.models import Conditions, EvaluatedModel, stored_model, untrained_model
from keural.evaluate.results.store import find_results, read_results
from keural.evaluate.tasks.items import Likelihood, LogProb
from keural.evaluate.tasks.kinds import KINDS
from keural.evaluate.tasks.library import select, shipped
from keural.evaluate.tasks.loading import LoadedTask, load
from keural.evaluate.tasks.spec import TaskSpec
from keural.tokenizer import Message, render
from tests.helpers.planted import Planted
from tests.helpers.small_sets import write_copa, write_mmlu

ROLLING = {"name": "own_text", "language": "en", "kind": "rolling", "places": [{"adapter": "text", "path": "own/*.txt"}]}


@pytest.fixture
def tiny(model_dir: Path) -> EvaluatedModel:
    return stored_model(model_dir, Conditions())


def planted(tiny: EvaluatedModel, likes: Any) -> EvaluatedModel:
    tiny.__dict__["network"] = Planted(likes)
    return tiny


def tasks(data: Path, tmp: Path) -> list[LoadedTask]:
    return [load(spec, data) for spec in select([], data)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sets")
    write_copa(directory, 60)
    write_mmlu(directory, 40)
    return directory


def test_a_model_that_is_given_the_answers_scores_one(tiny: EvaluatedModel, data: Path, tmp_path: Path) -> None:
    for task in tasks(data, tmp_path):
        told = planted(tiny, lambda number, place, task=task: 0.0 if task.items[number].right[place] else -5.0)
        results = evaluate(told, task, tmp_path).results

        assert [item.score for item in results.items] == [1.0] * len(task.items)
        assert all(item.given == item.expected for item in results.items)
        assert all(set(item.details["scores"].values()) == {1.0} for item in results.items)


def test_a_model_that_is_given_the_wrong_answers_scores_zero(tiny: EvaluatedModel, data: Path, tmp_path: Path) -> None:
    for task in tasks(data, tmp_path):
        told = planted(tiny, lambda number, place, task=task: -5.0 if task.items[number].right[place] else 0.0)

        assert {item.score for item in evaluate(told, task, tmp_path).results.items} == {0.0}


def test_blind_choices_score_chance(tiny: EvaluatedModel, data: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    for task in tasks(data, tmp_path):
        blind = planted(tiny, lambda number, place: draw.random())
        scores = [item.score for item in evaluate(blind, task, tmp_path).results.items]
        assert task.chance is not None
        error = (task.chance * (1 - task.chance) / len(scores)) ** 0.5

        assert abs(sum(scores) / len(scores) - task.chance) < 3 * error


def test_rules_divide_by_what_they_are_named_after(tiny: EvaluatedModel, data: Path, tmp_path: Path) -> None:
    task = load(shipped()["kobest_copa"].model_copy(update={"scoring": ["sum", "per_character", "per_byte", "per_token"]}), data, 0)
    item = replace(task.items[0], choices=("네", "nnnnn"), right=(False, True))
    asked = [Likelihood((1,), (5,)), Likelihood((1,), (5, 6))]

    result = KINDS["choice"].judge(task.spec, item, asked, [LogProb(-2.0, False), LogProb(-3.9, False)], {})

    assert result.details["scores"] == {"sum": 0.0, "per_character": 1.0, "per_byte": 0.0, "per_token": 1.0}
    assert result.details["chosen"] == {"sum": 0, "per_character": 1, "per_byte": 0, "per_token": 1}


def test_the_probability_of_true_answers_is_a_share(data: Path) -> None:
    spec = shipped()["truthfulqa_mc2"]
    item = replace(load(shipped()["kobest_copa"], data).items[0], choices=("a", "b", "c"), right=(True, False, True))

    result = KINDS["choice"].judge(
        spec, item, [Likelihood((1,), (5,))] * 3, [LogProb(value, False) for value in (-1000.0, -1000.0, -1001.0)], {}
    )

    assert result.score == pytest.approx((1 + 0.36788) / (2 + 0.36788), abs=1e-5)


def test_a_second_time_nothing_is_computed_and_no_weights_are_read(
    tiny: EvaluatedModel, model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load(shipped()["kobest_copa"], data)
    first = evaluate(tiny, task, tmp_path, limit=20)
    more = evaluate(stored_model(model_dir, Conditions()), task, tmp_path, limit=30)
    again = stored_model(model_dir, Conditions(), "under another name")
    monkeypatch.setattr(again, "_load", lambda: pytest.fail("the weights were read"))

    same = evaluate(again, task, tmp_path, limit=20)

    assert (first.computed, more.computed, same.computed) == (20, 10, 0)
    assert same.results == first.results
    assert same.file == first.file
    assert "asking" not in again.__dict__


def test_results_of_another_model_in_their_place_are_refused(
    tiny: EvaluatedModel, model_dir: Path, data: Path, tmp_path: Path
) -> None:
    task = load(shipped()["kobest_copa"], data)
    own = evaluate(tiny, task, tmp_path, limit=3).file
    other = evaluate(stored_model(model_dir, Conditions("text")), task, tmp_path, limit=3).file
    own.write_bytes(other.read_bytes())

    with pytest.raises(UserError, match=rf"{own}: holds results of another model or task"):
        evaluate(tiny, task, tmp_path, limit=3)


def test_a_network_that_wrote_answers_gives_its_memory_back(tiny: EvaluatedModel) -> None:
    asked = [generated.Writing((1, 5), 2)]
    assert list(generated.answer(tiny.network, [asked]))
    network = weakref.ref(tiny.network)

    tiny.close()
    gc.collect()

    assert network() is None


def test_other_conditions_are_other_results(model_dir: Path, data: Path, tmp_path: Path) -> None:
    task = load(shipped()["kobest_copa"], data)
    asked = [Conditions(), Conditions("text"), Conditions("chat"), Conditions(dtype="bfloat16"), Conditions("chat", system="짧게")]

    files = {evaluate(stored_model(model_dir, conditions), task, tmp_path, limit=2).file for conditions in asked}

    assert len(files) == len(asked)


def test_a_process_that_is_stopped_loses_a_batch_at_most(tiny: EvaluatedModel, data: Path, tmp_path: Path) -> None:
    task = load(shipped()["kobest_copa"], data)
    tiny.network.tokens = 64
    seen: list[str] = []

    def tell(text: str) -> None:
        seen.append(text)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny, task, tmp_path, tell=tell)
    (file,) = tmp_path.glob("*/*.jsonl")
    kept = len(read_results(file).items)
    rest = evaluate(tiny, task, tmp_path)

    assert 0 < kept < 60
    assert rest.computed == 60 - kept
    assert len(rest.results.items) == 60


def long_task(tmp_path: Path) -> LoadedTask:
    file = write_copa(tmp_path, 3)
    rows = file.read_text().splitlines()
    rows[2] = rows[2].replace("고양이가 잤다.", "고양이가 잤다. " * 60)
    file.write_text("\n".join(rows) + "\n")
    return load(shipped()["kobest_copa"], tmp_path)


def test_what_is_too_long_is_left_out_and_counted(tiny: EvaluatedModel, tmp_path: Path) -> None:
    results = evaluate(tiny, long_task(tmp_path), tmp_path / "results").results

    assert len(results.items) == 2
    assert results.left_out == {"too_long": 1}


def test_what_is_too_long_is_cut_where_that_is_asked_for_and_counted(model_dir: Path, tmp_path: Path) -> None:
    task, results = long_task(tmp_path), tmp_path / "results"
    evaluate(stored_model(model_dir, Conditions()), task, results)
    cutting = evaluate(stored_model(model_dir, Conditions(too_long="cut")), task, results)
    again = evaluate(stored_model(model_dir, Conditions()), task, results)

    assert (cutting.computed, again.computed) == (1, 1)
    assert [item.details.get("cut", 0) > 0 for item in cutting.results.items] == [False, True, False]
    assert (len(again.results.items), again.results.left_out) == (2, {"too_long": 1})


def test_a_text_is_paid_for_token_by_token_once(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.txt").write_text("the cat sees two birds. " * 40)
    (folder / "b.txt").write_text("안녕하세요")
    task = load(TaskSpec.model_validate(ROLLING), tmp_path)
    half = load(TaskSpec.model_validate(ROLLING | {"window": {"length": 100, "overlap": 0.0}}), tmp_path)

    found = [evaluate(stored_model(model_dir, Conditions()), each, tmp_path / "results").results for each in (task, half)]

    tokenizer = stored_model(model_dir, Conditions()).asking.tokenizer
    for results in found:
        for item, text in zip(results.items, ("the cat sees two birds. " * 40, "안녕하세요"), strict=True):
            assert item.details["predicted_tokens"] == len(tokenizer.encode(text)) + 1
            assert item.details["bytes"] == len(text.encode())
            assert item.score > 0
    assert set(found[0].baselines) >= {"xz_9"}
    with pytest.raises(UserError, match="leave --shots out"):
        load(TaskSpec.model_validate(ROLLING), tmp_path, shots=2)


def test_who_does_not_read_is_measured_on_the_items_that_were_asked(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for name, text in (("a", "the cat " * 40), ("b", "월요일 아침 " + "".join(map(chr, range(0xAC00, 0xAC60))))):
        (tmp_path / "own" / f"{name}.txt").write_text(text, encoding="utf-8")
    task = load(TaskSpec.model_validate(ROLLING), tmp_path)
    model = stored_model(model_dir, Conditions(too_long="cut"))
    results = [evaluate(model, task, tmp_path / "results", limit).results for limit in (1, None, 1)]

    assert results[0].baselines == results[2].baselines == task.baselines(1)
    assert results[1].baselines == task.baselines() != task.baselines(1)
    (file,) = find_results(tmp_path / "results")
    assert read_results(file).results(1).baselines == task.baselines(1)


def test_the_untrained_network_is_that_of_its_seed(model_dir: Path, data: Path, tmp_path: Path) -> None:
    task = load(shipped()["kobest_copa"], data)
    found = [evaluate(untrained_model(model_dir, seed, Conditions()), task, tmp_path, limit=3).results for seed in (1, 1, 2)]

    assert found[0].items == found[1].items
    assert found[0].items != found[2].items


def test_chats_are_refused_of_who_knows_none(model_dir: Path, tmp_path: Path) -> None:
    import shutil

    copied = tmp_path / "model"
    shutil.copytree(model_dir, copied)
    (copied / "chat_template.jinja").unlink()
    (copied / "keural.json").unlink()

    with pytest.raises(UserError, match="has no chat template"):
        stored_model(copied, Conditions("chat"))


def test_an_engine_that_gives_no_log_probabilities_is_refused() -> None:
    with pytest.raises(UserError, match=r"--engine llama.cpp: log-probabilities"):
        Conditions(engine="llama.cpp")
    with pytest.raises(UserError, match="--system is for chats"):
        Conditions(system="짧게")


def test_a_system_message_stands_before_questions_and_pairs_alike(model_dir: Path) -> None:
    plain, told = (stored_model(model_dir, Conditions("chat", system=system)).asking for system in (None, "짧게"))
    user = [Message("user", "the cat")]

    for ask in (lambda asking: asking.likelihood("the cat", " sees")[0], lambda asking: asking.answer(user, "sees")[0]):
        system = render(plain.tokenizer, [Message("system", "짧게")]).ids
        assert list(ask(told).context) == system + list(ask(plain).context)
        assert ask(told).continuation == ask(plain).continuation
    own = [Message("system", "길게"), *user]
    assert told.answer(own, "sees") == plain.answer(own, "sees")
