"""Tasks whose sets only a hub has, on small files of the shapes in which the hub has them: what is asked, and planted opinions."""

import importlib
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from keural.data.adapters.evaluation import ADAPTERS
from keural.evaluate.evaluation import evaluate
from keural.evaluate.generated.kind import judge
from keural.evaluate.models import Conditions, EvaluatedModel, stored_model
from keural.evaluate.tasks.items import Writing, Written
from keural.evaluate.tasks.library import select, shipped
from keural.evaluate.tasks.loading import LoadedTask, load
from keural.recipe import SourceSpec
from tests.helpers.planted import knowing, opinionated, shuffled

COUNT = 100
FACTS = ("강", "산", "바다", "도시", "나무", "새", "달", "해", "꽃", "돌")


def _choices(draw: random.Random, count: int) -> list[str]:
    return [f"{draw.choice(FACTS)} {number}" for number in draw.sample(range(100), count)]


def kmmlu_row(draw: random.Random, number: int) -> dict[str, Any]:
    letters = dict(zip("ABCD", _choices(draw, 4), strict=True))
    return {"question": f" {number}번 문제는? ", "answer": draw.randint(1, 4), **letters, "Category": "Law", "Human Accuracy": 0.5}


def haerae_row(draw: random.Random, number: int) -> dict[str, Any]:
    options = _choices(draw, 5)
    query = f"다음을 읽고 답하시오. {number}\n" + "\n".join(
        f"({letter}) {text}" for letter, text in zip("ABCDE", options, strict=True)
    )
    return {"query": f"{query}\n### 정답: ", "options": str(options), "answer": f"({draw.choice('ABCDE')})"}


def click_row(draw: random.Random, number: int) -> dict[str, Any]:
    choices = _choices(draw, 5 if number % 4 == 0 else 4)
    paragraph = f"글 {number}" if number % 2 else ""
    name = f"{'CSAT_korean' if number % 4 == 0 else 'KIIP_economy'}_{number}"
    return {"id": name, "paragraph": paragraph, "question": f" {number}? ", "choices": choices, "answer": draw.choice(choices)}


def kobalt_row(draw: random.Random, number: int) -> dict[str, Any]:
    below = "\n".join(f"{letter}: {text}" for letter, text in zip("ABCDEFGHIJ", _choices(draw, 10), strict=True))
    text = f"밑줄 친 말의 뜻은? {number}\n\nB: 오늘 갈래?\nA가 대답했다.\n\n{below}"
    return {"ID": f"k{number}", "Class": "Semantics", "Question": text, "Answer": draw.choice("ABCDEFGHIJ")}


ROWS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "kmmlu": kmmlu_row,
    "haerae_history": haerae_row,
    "click": click_row,
    "kobalt": kobalt_row,
}


ALIKE = sorted(name for name in shipped() if name.startswith("haerae_"))
"""Tasks that differ in nothing but the configuration."""


def write_hub(data: Path, name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows where `hf download --local-dir` puts a set, with the configuration and the split that the task names."""
    place = next(place for place in shipped()[name].places if place.hub)
    directory = data / str(place.hub)
    directory.mkdir(parents=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (directory / "rows.jsonl").write_text(lines, encoding="utf-8")
    files = [{"split": place.split, "path": "rows.jsonl"}]
    card = yaml.safe_dump({"configs": [{"config_name": place.config or "default", "data_files": files}]})
    (directory / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    return rows


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("datasets", reason="datasets is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="module", params=ROWS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedTask, list[dict[str, Any]]]:
    data, name = tmp_path_factory.mktemp("data"), request.param
    draw = random.Random(name)
    rows = write_hub(data, name, [ROWS[name](draw, number) for number in range(COUNT)])
    return load(shipped()[name], data, 0), rows


def reader_of_anything(model_dir: Path) -> EvaluatedModel:
    """A model that items of any length fit into, for scorers without a network."""
    model = stored_model(model_dir, Conditions())
    model.__dict__["asking"] = replace(model.asking, context_length=10**6)
    return model


def test_items_are_what_lm_eval_makes_of_the_same_rows(loaded: tuple[LoadedTask, list[dict[str, Any]]]) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.utils import apply_template

    task, rows = loaded
    root = Path(lm_eval.__file__).parent / "tasks"
    assert len(task.items) == COUNT
    if task.spec.name == "kobalt":
        pytest.skip("lm-eval has no KoBALT")
    for item, row in zip(task.items, rows, strict=True):
        if task.spec.name == "click":
            theirs = importlib.import_module("lm_eval.tasks.click.click_cul.utils")
            asked, right = theirs.get_context(row), "ABCDE".index(theirs.get_target(row))
            choices = tuple(theirs.get_choices(row))
        else:
            file = "kmmlu/default/_default_kmmlu_yaml" if task.spec.name == "kmmlu" else "haerae/_default_haerae_yaml"
            config = yaml.safe_load((root / file).read_text(encoding="utf-8"))
            asked, choices = apply_template(config["doc_to_text"], row), tuple(config["doc_to_choice"])
            target = apply_template(config["doc_to_target"], row)
            right = int(target) if target.isdigit() else choices.index(target)
        assert item.prompt == asked
        assert item.choices[: len(choices)] == choices
        assert item.right.index(True) == right


def test_planted_answers_score_one_and_labels_that_say_nothing_score_chance(
    loaded: tuple[LoadedTask, list[dict[str, Any]]], model_dir: Path, tmp_path: Path
) -> None:
    task, _ = loaded
    model = reader_of_anything(model_dir)
    model.__dict__["network"] = knowing(task)
    assert {item.score for item in evaluate(model, task, tmp_path / "known").results.items} == {1.0}

    drawn = shuffled(task)
    model.__dict__["network"] = opinionated(drawn)
    check_chance([item.score for item in evaluate(model, drawn, tmp_path / "blind").results.items], drawn)


def check_chance(scores: list[float], task: LoadedTask) -> None:
    assert task.chance is not None
    error = statistics.stdev(scores) / len(scores) ** 0.5
    assert abs(statistics.mean(scores) - task.chance) < 3 * error


def test_the_parts_of_haerae_are_asked_alike() -> None:
    specs = [shipped()[name] for name in ALIKE]
    assert len({spec.places[0].config for spec in specs}) == len(ALIKE) == 5
    assert len({(spec.question, str(spec.choices), tuple(spec.scoring), spec.delimiter, spec.places[0].hub) for spec in specs}) == 1


@pytest.mark.slow
def test_on_every_set_planted_answers_score_one_and_labels_that_say_nothing_score_chance(
    real_data: Path, model_dir: Path, tmp_path: Path
) -> None:
    model, checked = reader_of_anything(model_dir), []
    for spec in select([], real_data):
        if spec.kind not in ("choice", "pair"):
            continue
        task = load(spec, real_data, 0)
        model.__dict__["network"] = knowing(task)
        known = [item.score for item in evaluate(model, task, tmp_path / "known").results.items]
        assert len(known) == len(task.items)
        assert min(known) == pytest.approx(1.0), spec.name
        drawn = shuffled(task)
        model.__dict__["network"] = opinionated(drawn)
        check_chance([item.score for item in evaluate(model, drawn, tmp_path / "blind").results.items], drawn)
        checked.append(spec.name)
    assert len(checked) >= 17


def test_choices_of_kobalt_are_the_lines_that_count_up(tmp_path: Path) -> None:
    convert = ADAPTERS["kobalt"].convert
    source = SourceSpec(name="s", adapter="kobalt")

    item = convert(
        {"Question": "B: 갈래?\nA. 뜻\nB: 말\n그 다음\nB. 아니다\nC) 맞다", "Answer": "C", "Class": "Syntax"}, source, "row:1"
    )

    assert (item.question, item.choices, item.gold) == ("B: 갈래?", ("뜻", "말\n그 다음\nB. 아니다", "맞다"), 2)
    assert convert({"Question": "무엇?\nA: 하나\nB: 둘", "Answer": "Z"}, source, "row:1").gold is None


def test_facts_about_korea_are_right_by_their_first_line(tmp_path: Path) -> None:
    row = {"id": 7, "content": "가장 긴 강은?", "answer": "압록강", "category": "Geography", "answer_type": "place"}
    (tmp_path / "eval_kosimpleqa").mkdir()
    (tmp_path / "eval_kosimpleqa" / "kosimpleqa.json").write_text(json.dumps([row], ensure_ascii=False), encoding="utf-8")
    task = load(shipped()["kosimpleqa"], tmp_path)
    (item,) = task.items
    assert item.prompt == "질문: 가장 긴 강은?\n답:"

    def score(text: str) -> float:
        return judge(task.spec, item, [Writing((1,), 1)], [Written(text, 1, "stop")], {}).score

    assert [score(text) for text in (" 압록강", " 압록강입니다.\n더", "\n압록 강", " 한강", "", " 압록강과 한강")] == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]


def test_instructions_of_ifeval_ko_are_read_as_the_hub_has_them(tmp_path: Path) -> None:
    arguments = [{"num_words": 3, "relation": "at least", "keywords": None}, {"keywords": None}]
    kinds = ["length_constraints:number_words", "punctuation:no_comma"]
    rows = [{"key": 1, "prompt": "세 낱말로", "instruction_id_list": kinds, "kwargs": arguments}]
    write_hub(tmp_path, "ifeval_ko", rows)

    task = load(shipped()["ifeval_ko"], tmp_path)

    (item,) = task.items
    verdicts = [
        judge(task.spec, item, [Writing((1,), 1)], [Written(text, 1, "stop")], {}).details["followed"]["strict"]
        for text in ("하나 둘 셋", "하나, 둘")
    ]
    assert verdicts == [[[True, True]], [[False, False]]]
