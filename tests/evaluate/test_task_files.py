"""Tasks as data: what a file may say, what is refused and how, what becomes of a set's rows."""

import json
from pathlib import Path

import pytest
import yaml

from keural.errors import UserError
from keural.evaluate.tasks.items import Item
from keural.evaluate.tasks.library import select, shipped
from keural.evaluate.tasks.loading import LoadedTask, load
from keural.evaluate.tasks.spec import PlaceSpec, ShotsSpec, TaskSpec, read_task
from keural.evaluate.tasks.template import check_template, fill
from tests.helpers.small_sets import COPA, write_copa, write_mmlu

OWN = {
    "name": "own",
    "language": "en",
    "kind": "choice",
    "places": [{"adapter": "evaluation", "path": "own/items.jsonl", "options": {"choices": "options", "answers": "answer"}}],
}


def written(directory: Path, **changes: object) -> Path:
    file = directory / "own.yaml"
    file.write_text(yaml.safe_dump(OWN | changes), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", [name for name, spec in shipped().items() if spec.made is None])
def test_a_shipped_task_whose_set_is_missing_says_how_to_bring_it(name: str, tmp_path: Path) -> None:
    spec = shipped()[name]

    assert spec.title
    with pytest.raises(UserError, match=r"keural data fetch evaluation .* --only|hf download --repo-type dataset"):
        load(spec, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quesion": "x"}, r"unknown key 'quesion' \(did you mean 'question'\?\)"),
        ({"kind": "chioce"}, "kind"),
        ({"name": "Own Task"}, "name"),
        ({"places": []}, "places"),
        ({"places": [{"adapter": "arc"}]}, "either a path in the data directory or a hub"),
        ({"places": [{"adapter": "arc", "path": "../secret"}]}, "leads out"),
        ({"question": "{{ question.__class__ }}"}, "not allowed"),
        ({"question": "{% for x in choices %}{% endfor %}"}, "not allowed"),
        ({"question": "{{ lipsum() }}"}, "not allowed"),
        ({"question": "{{ question * 9 }}"}, "not allowed"),
        ({"question": "{{ question | format }}"}, "No filter|no filter"),
        ({"question": "{{ question"}, "template"),
        ({"choices": ["yes"]}, "at least two"),
        ({"scoring": []}, "scoring"),
        ({"scoring": ["sum", "sum"]}, "twice"),
        ({"scoring": ["mass"]}, "labelled"),
        ({"chance": 1.5}, "chance"),
        ({"shots": {"seed": -1}}, "seed"),
        ({"kind": "rolling", "choices": ["a", "b"]}, "for kind choice"),
        ({"kind": "choice", "pairing": {"good": ["1"], "bad": ["0"]}}, "for kind pair"),
    ],
)
def test_what_a_task_cannot_be_is_refused_with_file_and_key(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    file = written(tmp_path, **changes)

    with pytest.raises(UserError, match=said) as refused:
        read_task(file)

    assert str(file) in str(refused.value)


def test_a_file_that_is_no_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("- a\n- b\n")

    with pytest.raises(UserError, match="must be a map"):
        read_task(tmp_path / "own.yaml")


def test_templates_put_values_in_and_run_nothing() -> None:
    values = {"question": "{{ 7 * 7 }}", "choices": ["a", "b"], "subject": "world_history", "passage": ""}

    assert fill("{{ subject | spaced }}: {{ question }} {{ choices[1] }}", values) == "world history: {{ 7 * 7 }} b"
    assert fill("{% if passage %}{{ passage }}{% else %}none{% endif %}", values) == "none"
    assert fill("{{ choices | lettered }}", values) == "A. a\nB. b"
    with pytest.raises(ValueError, match="subjekt"):
        fill("{{ subjekt }}", values)
    with pytest.raises(ValueError, match="not allowed"):
        check_template("{% set x = 1 %}")


@pytest.mark.parametrize(
    ("template", "unknown"),
    [("{{ question['upper'] }}", "upper"), ("{{ question['__class__'] }}", "__class__"), ("{{ range }}", "range")],
)
def test_places_of_values_lead_to_no_attributes_or_functions(template: str, unknown: str) -> None:
    check_template(template)

    with pytest.raises(ValueError, match=unknown):
        fill(template, {"question": "x"})


@pytest.mark.parametrize(
    "template", ["{{ " + "(" * 3000 + "question" + ")" * 3000 + " }}", "{% if question %}" * 300 + "{% endif %}" * 300]
)
def test_templates_that_python_cannot_hold_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        check_template(template)


@pytest.mark.parametrize("key", ["preamble", "question"])
def test_a_template_that_fits_no_row_is_refused_with_the_row(key: str, tmp_path: Path) -> None:
    items = tmp_path / "own" / "items.jsonl"
    items.parent.mkdir()
    items.write_text(json.dumps({"question": "q", "options": ["a", "b"], "answer": "a"}) + "\n", encoding="utf-8")
    place = {"adapter": "evaluation", "path": "own/items.jsonl"}
    options = {"choices": "options", "gold": "answer", "gold_is": "text"}
    spec = read_task(written(tmp_path, places=[place | {"options": options}], **{key: "{{ nosuch }}"}))

    with pytest.raises(UserError, match=r"1 template.*items.jsonl:1.*'nosuch' is undefined"):
        load(spec, tmp_path)


def loaded(data: Path, name: str = "kobest_copa", shots: int | None = None) -> LoadedTask:
    return load(select([name], data)[0], data, shots)


def test_items_are_asked_in_the_words_of_the_harness(tmp_path: Path) -> None:
    write_copa(tmp_path)

    task = loaded(tmp_path)

    assert task.items[0].prompt == f"{COPA[0][0]} 0  그래서"
    assert task.items[1].prompt == f"{COPA[1][0]} 1  왜냐하면"
    assert task.items[2].choices == COPA[2][2:4]
    assert task.items[2].right == (False, True)
    assert (task.chance, task.left_out, len(task.items)) == (0.5, {}, 4)


def test_the_sets_folder_may_be_the_data_directory_itself(tmp_path: Path) -> None:
    write_copa(tmp_path)

    assert loaded(tmp_path / "eval_kobest").digest == loaded(tmp_path).digest


def test_rows_that_cannot_be_asked_are_counted(tmp_path: Path) -> None:
    file = write_copa(tmp_path)
    rows = file.read_text().splitlines()
    rows += ["7\t문장\t이유\t하나\t둘\t1", "8\t문장\t결과\t하나\t둘\t3", "9\t문장\t결과\t\t둘\t2"]
    file.write_text("\n".join(rows) + "\n")

    task = loaded(tmp_path)

    assert len(task.items) == 4
    assert task.left_out == {"no_word": 1, "no_right_choice": 2}


def test_a_set_of_which_nothing_can_be_asked_is_refused(tmp_path: Path) -> None:
    file = write_copa(tmp_path)
    file.write_text(file.read_text().replace("결과", "이유").replace("원인", "이유"))

    with pytest.raises(UserError, match=r"kobest_copa: no item can be asked .4 no_word.*'이유'"):
        loaded(tmp_path)


def test_labels_that_name_no_choice_are_called_that(tmp_path: Path) -> None:
    file = write_copa(tmp_path, 1)
    file.write_text(file.read_text().rstrip()[:-1] + "7\n")

    with pytest.raises(UserError, match=r"1 no_right_choice.*its label names none of the 2 choices"):
        loaded(tmp_path)


@pytest.mark.parametrize("changes", [{"cluster": "relatoin"}, {"shots": ShotsSpec(same="relatoin")}])
def test_groups_by_what_no_item_has_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    """All items would be of one group."""
    write_copa(tmp_path)
    spec = shipped()["kobest_copa"]

    with pytest.raises(UserError, match=r"no item has 'relatoin' .did you mean 'relation'"):
        load(spec.model_copy(update=changes), tmp_path)
    load(spec.model_copy(update={"cluster": "relation"}), tmp_path)


def test_an_item_is_known_by_its_content_and_the_same_ones_are_told_apart(tmp_path: Path) -> None:
    file = write_copa(tmp_path)
    before = [item.id for item in loaded(tmp_path).items]
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, rows[2], rows[0], rows[0]]) + "\n")

    found = [item.id for item in loaded(tmp_path).items]

    assert found == [before[2], before[0], f"{before[0]}-2"]


def test_other_contents_shots_or_settings_are_another_digest(tmp_path: Path) -> None:
    file = write_copa(tmp_path)
    digests = {loaded(tmp_path).digest, loaded(tmp_path, shots=0).digest}
    assert len(digests) == 1
    spec = shipped()["kobest_copa"]
    digests.add(load(spec.model_copy(update={"question": "{{ question }}"}), tmp_path).digest)
    file.write_text(file.read_text().replace("비가", "눈이"))
    digests.add(loaded(tmp_path).digest)

    assert len(digests) == 3


def own_examples(data: Path, sampler: str, shots: int, same: str | None = None) -> LoadedTask:
    changes = {"shots": {"sampler": sampler, **({"same": same} if same else {})}}
    spec = shipped()["mmlu"].model_dump(exclude={"shots"}, exclude_none=True) | changes
    return load(TaskSpec.model_validate(spec), data, shots)


def test_examples_are_solved_and_never_the_asked_item(tmp_path: Path) -> None:
    write_mmlu(tmp_path)

    for sampler in ("first", "random"):
        task = own_examples(tmp_path, sampler, 2)
        for number, item in enumerate(task.items):
            assert item.prompt.count("Answer: ") == 2
            assert item.prompt.endswith(f"What is {number}?\nA. the cat\nB. two birds\nC. a house\nD. monday\nAnswer:")
            assert item.prompt.count(f"What is {number}?") == 1


def test_examples_can_be_of_the_items_subject_alone(tmp_path: Path) -> None:
    write_mmlu(tmp_path)

    task = own_examples(tmp_path, "first", 2, same="subject")

    assert all(f"What is {other}?" not in item.prompt for item in task.items for other in range(6) if (other - item.number) % 2)
    with pytest.raises(UserError, match="there are 2 examples, and 3 are asked for"):
        own_examples(tmp_path, "first", 3, same="subject")


def test_a_part_of_a_task_is_a_task(tmp_path: Path) -> None:
    write_mmlu(tmp_path)

    task = loaded(tmp_path, "mmlu_anatomy")

    assert [item.prompt.split("about ")[1].split(".")[0] for item in task.items] == ["anatomy"] * 3
    with pytest.raises(UserError, match=r"no item can be asked: no row has.*anatomi.*did you mean 'anatomy'"):
        loaded(tmp_path, "mmlu_anatomi")


def test_names_files_and_languages_stand_for_tasks(tmp_path: Path) -> None:
    write_copa(tmp_path)
    write_mmlu(tmp_path)

    def names(*wanted: str) -> list[str]:
        return [spec.name for spec in select(wanted, tmp_path)]

    assert names() == ["kobest_copa", "mmlu"]
    assert names("ko") == ["kobest_copa"]
    assert names("mmlu", "en", str(written(tmp_path))) == ["mmlu", "own"]
    with pytest.raises(UserError, match=r"unknown task 'kobest_cop' \(did you mean 'kobest_copa'\?\)"):
        names("kobest_cop")
    with pytest.raises(UserError, match="no such file"):
        names("nothing/here.yaml")


def test_true_and_false_answers_have_their_own_chance(tmp_path: Path) -> None:
    file = tmp_path / "eval_truthfulqa" / "mc_task.json"
    file.parent.mkdir()
    rows = [
        {"question": "Is it?", "mc1_targets": {"Yes.": 1, "No.": 0}, "mc2_targets": {"Yes.": 1, "Sure.": 1, "No.": 0, "Never.": 0}},
        {"question": "Why?", "mc1_targets": {"a": 0, "b": 0, "c": 0, "d": 1}, "mc2_targets": {"a": 0, "b": 1}},
    ]
    file.write_text(json.dumps(rows))

    assert loaded(tmp_path, "truthfulqa_mc1").chance == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert loaded(tmp_path, "truthfulqa_mc2").items[0].right == (True, True, False, False)


def pairs(data: Path) -> list[Item]:
    return list(loaded(data, "square_ko").items)


def test_answers_with_labels_become_pairs_of_one_question(tmp_path: Path) -> None:
    file = tmp_path / "pref_square_ko" / "response_test_ood.json"
    file.parent.mkdir()
    rows = [
        {"question": "왜?", "response": "좋은 답", "acceptable?": 1},
        {"question": "왜?", "response": "나쁜 답이다", "acceptable?": 0},
        {"question": "왜?", "response": "더 나쁜 답", "acceptable?": 0},
        {"question": "언제?", "response": "홀로", "acceptable?": 1},
    ]
    file.write_text(json.dumps(rows, ensure_ascii=False))

    task = loaded(tmp_path, "square_ko")

    assert [item.choices for item in task.items] == [("좋은 답", "나쁜 답이다"), ("좋은 답", "더 나쁜 답")]
    assert {item.cluster for item in task.items} == {"왜?"}
    assert task.left_out == {"no_counterpart": 1}
    assert task.baselines() == {"longer": 0.0, "length_only": 1.0}


def test_an_adapter_of_another_kind_of_records_is_refused(tmp_path: Path) -> None:
    write_copa(tmp_path)
    spec = shipped()["kobest_copa"].model_dump(exclude_none=True)
    spec |= {"name": "own", "kind": "rolling", "question": "", "choices": "own", "words": {}}

    with pytest.raises(UserError, match="adapter kobest_copa gives evaluation, of which kind rolling makes nothing"):
        load(TaskSpec.model_validate(spec), tmp_path)


@pytest.mark.parametrize(("form", "gold"), [("text", "two"), ("letter", "B"), ("from_0", 1), ("from_1", 2)])
def test_a_quiz_of_ones_own_says_which_choice_is_right(tmp_path: Path, form: str, gold: object) -> None:
    rows = [
        {"q": "Which?", "options": ["one", "two", "three"], "answer": gold, "topic": "numbers"},
        {"q": "Why?", "options": ["a", "b"]},
    ]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"question": "q", "choices": "options", "gold": "answer", "gold_is": form, "fields": ["topic"]}
    places = [{"adapter": "evaluation", "path": "own/items.jsonl", "options": options}]
    spec = read_task(
        written(tmp_path, places=places, question="{{ topic }}: {{ question }}\n{{ choices | lettered }}", choices="letters")
    )

    task = load(spec, tmp_path)

    assert task.items[0].prompt == "numbers: Which?\nA. one\nB. two\nC. three"
    assert task.items[0].right == (False, True, False)
    assert task.left_out == {"no_right_choice": 1}


HUB_ROWS = {
    "kmmlu": [{"question": "무엇?", "A": "가", "B": "나", "C": "다", "D": "라", "answer": 3, "Category": "Law"}],
    "haerae_history": [{"query": "무엇? (A) 가 (B) 나", "options": "['가', '나', '다', '라', '마']", "answer": "(C)"}],
    "click": [{"id": "x_1", "paragraph": "", "question": "무엇?", "choices": ["가", "나", "다", "라"], "answer": "다"}],
    "kobest_wic": [{"word": "배", "context_1": "배를 먹었다.", "context_2": "배를 탔다.", "label": 0}],
    "arc_challenge": [{"question": "What?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"}],
    "openbookqa": [{"question_stem": "What", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "C"}],
    "kobest_copa": [{"premise": "왔다.", "question": "결과", "alternative_1": "가", "alternative_2": "나", "label": 1}],
    "kobest_boolq": [{"paragraph": "글", "question": "예?", "label": 1}],
    "kobest_sentineg": [{"sentence": "좋다", "label": 1}],
    "truthfulqa_mc1": [{"question": "Q?", "mc1_targets": {"choices": ["t", "f"], "labels": [1, 0]}, "mc2_targets": {}}],
    "mmlu": [{"question": "Q?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2}],
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_as_hubs_have_them_are_asked(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HUB_ROWS[name]))
    adapter = next(place.adapter for place in shipped()[name].places if place.hub)
    place = [PlaceSpec(adapter=adapter, path="rows.jsonl")]

    (item,) = load(shipped()[name].model_copy(update={"places": place}), tmp_path).items

    expected = {"kobest_wic": 0, "truthfulqa_mc1": 0, "kobest_copa": 1, "kobest_boolq": 1, "kobest_sentineg": 1}.get(name, 2)
    assert item.right.index(True) == expected
    assert sum(item.right) == 1
