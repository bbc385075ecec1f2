"""The report of whole, partial and broken runs: what is on the page, that it stands alone, and that text stays text."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from keural.errors import UserError
from keural.files import read_checked_text, write_checked_text
from keural.pipeline.run_contents import read_run
from keural.pipeline.run_directory import Done, Summary
from keural.report.alignment import by_source
from keural.report.html import write_report as write_report_of
from keural.train.checks.record import ChecksFile
from keural.train.stage.metrics import line_text

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
STAGES = [("pretrain-1", "next_token"), ("sft-1", "sft"), ("dpo-1", "dpo")]


class Page(HTMLParser):
    """Text, headings and references of a page; refuses tags that do not pair up."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.references: list[str] = []
        self.drawings = 0
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.drawings += tag == "svg"
        self.references += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"script", "style"}:
            self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def write_report(run: Path) -> Path:
    """The report of a run directory, read and checked first."""
    return write_report_of(read_run(run))


def metrics(objective: str, steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(steps):
        line: dict[str, Any] = {
            "step": step, "loss": 2.0 / (step + 1), "learning_rate": 1e-3, "gradient_norm": 1.0,
            "tokens": 100 * (step + 1), "seconds": 0.5 * (step + 1),  # of the stage so far
            "tokens_per_second": 200.0, "balance_loss": 1.1, "z_loss": 0.2, "expert_load": [[0.5, 0.3, 0.2], [0.3, 0.3, 0.4]],
        }  # fmt: skip
        if objective == "dpo":
            line |= {"reward_margin": step * 0.1, "reward_accuracy": 0.9, "reward_chosen": 0.1, "reward_rejected": -0.1}
        if objective == "kto":
            line |= {"reward_margin": step * 0.1, "reward_desirable": 0.1, "logprob_desirable": -9.0, "kl": 0.5}
            line |= {"reward_undesirable": -0.1, "logprob_undesirable": -9.0} if step % 3 else {}  # a step may have no bad answer
        lines.append(line)
    return [*lines, {"step": steps - 1, "heldout": {"loss": 0.5, "items": 7}}]


def write_stage(run: Path, name: str, objective: str, steps: int = 12, done: bool = True) -> dict[str, Any]:
    directory = run / name
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(line_text(line) for line in metrics(objective, steps)))
    write_checked_text(directory / "stage.yaml", yaml.safe_dump({"name": name, "objective": objective, "init_from": "random"}))
    result = {
        "name": name, "objective": objective, "seconds": 75.0, "tokens": 123_456, "steps": steps, "loss_first": 2.0,
        "loss_last": 0.125, "heldout": {"loss": 0.5}, "init_from": "random", "fingerprint": "f", "init": "random",
    }  # fmt: skip
    if done:
        Done(**result).write(directory / "done.json")
    return result


def write_recipe(run: Path, description: str = "") -> None:
    stages = [{"name": name, "objective": objective} for name, objective in STAGES]
    recipe = {"name": "small", "description": description, "stages": [name for name, _ in STAGES], "notes": ["from the card"]}
    run.mkdir(parents=True, exist_ok=True)
    write_checked_text(run / "recipe.yaml", yaml.safe_dump({"recipe": recipe, "stages": stages}, allow_unicode=True))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with everything a report can show."""
    directory = tmp_path / "small"
    write_recipe(directory, "A small <run> & its report")
    done = [write_stage(directory, name, objective) for name, objective in STAGES]
    evaluation = {
        "accuracy": 0.957, "accuracy_stderr": 0.011, "items": 360,
        "by_task": {"더하기": 0.9}, "by_language": {"ko": 0.94, "en": 0.97},
        "by_task_and_language": {"더하기": {"ko": 0.88}}, "preference_accuracy": 0.985, "pairs": 200,
        "polite_rate": {"before": 0.52, "after": 1.0}, "heldout": {"extra": {"figure": 0.25}},
        "before": {
            "stage": "sft-1", "accuracy": 0.951, "by_task": {"더하기": 0.89}, "by_language": {}, "preference_accuracy": 0.62,
        },
        "bits_per_byte": [{
            "name": "Korean prose", "language": "ko", "documents": 4, "bytes": 1200,
            "models": {"untrained": 8.31, "dpo-1": 1.92}, "xz": 2.31, "zstd": 2.47,
        }],
    }  # fmt: skip
    summary = {
        "recipe": "small", "seconds": 225, "stages": done, "evaluation": evaluation,
        "samples": [{"language": "ko", "prompt": "<script>alert(1)</script>", "answer": "서른여덟입니다.", "expected": "서른여덟"}],
        "data": {"pretrain-1": [{"source": "prose", "rows": 50, "kept": 47, "drops": {"too_short": 2, "duplicate": 1}}]},
    }  # fmt: skip
    Summary.model_validate(summary).write(directory / "summary.json")
    return directory


def test_finished_run_shows_everything(run: Path) -> None:
    path = write_report(run)
    page = Page(path)

    assert path == run / "report.html"
    assert page.headings == [
        "Stages", "Evaluation", "Sample exchanges", "Curves", "Experts", "Preference optimisation", "Data", "Settings",
    ]  # fmt: skip
    for text in (
        "3 of 3", "3 min 45 s", "370k", "2 → 0.125", "95.7%", "95.1% before the last DPO", "98.5%", "52.0%", "100.0%", "더하기",
        "88.0%", "Korean prose", "8.310", "1.920", "2.310", "2.470", "zstd -19",
        "too_short 2, duplicate 1", "서른여덟입니다.", "extra.figure",
        "from the card", "expected: 서른여덟",
        "A small <run> & its report", "Standard error of the exact match: 1.1%",
    ):  # fmt: skip
        assert text in page.words, text
    assert page.drawings == 6 + 1 + 3 + 2


def test_checks_alarms_sources_and_lengths_are_shown(run: Path) -> None:
    stage = run / "dpo-1"
    found = [{"check": "swapped_pair", "store": "training", "count": 3, "looked_at": 4000, "allowed": 0.001, "first": "record 7"}]
    bias = [{"store": "training", "source": "hh", "pairs": 500, "longer": 0.625, "chosen_tokens": 81.0, "rejected_tokens": 64.0}]
    ChecksFile(fingerprint="f", findings=found, lengths=bias, isolation=0.0, reference_difference=1e-7).write(stage / "checks.json")
    figures = {"loss": 0.5, "items": 7, "source/a/b/loss": 0.75, "source/a/b/items": 4, "source/a/b/reward_accuracy": 0.5}
    figures |= {"language/ko/loss": 0.25, "language/ko/items": 3}
    lines = [{"step": 11, "alarm": "accuracy_low", "message": "only 30% are <b>"}, {"step": 11, "heldout": figures}]
    with (stage / "metrics.jsonl").open("a") as file:
        file.write("".join(map(line_text, lines)))
    done = Done.read(stage / "done.json")
    done.model_copy(update={"heldout": figures}).write(stage / "done.json")
    page = Page(write_report(run))
    assert page.headings[6:] == ["Held out by source", "Data", "Checks", "Settings"]
    for text in (
        "dpo-1, step 12: only 30% are <b>", "also swapped", "3 of 4,000", "differ by 1.0e-07 per token", "62.5%", "a/b",
        "language ko", "50.0%", "Preference by length",
    ):  # fmt: skip
        assert text in page.words, text


def test_what_a_stage_changed_of_each_source_is_shown_and_marked_only_where_it_is_significant(run: Path) -> None:
    def change(difference: float, better: bool | None) -> dict[str, Any]:
        figures = {"items": 1200, "before": 2.5, "after": 2.5 + difference, "difference": difference, "error": 0.01}
        return figures | {"low": difference - 0.02, "high": difference + 0.02, "p_holm": 0.5, "better": better}

    changes = {"all": change(-0.25, True), "source/a|b": change(-0.5, True), "source/c/d": change(0.0625, False)}
    changes |= {"source/e": change(-0.015, None), "language/ko": change(-0.125, True)}
    done = Done.read(run / "sft-1" / "done.json")
    done.model_copy(update={"heldout": {"loss": 2.25}, "heldout_change": changes}).write(run / "sft-1" / "done.json")
    [table] = by_source(read_run(run))
    shown = {row[0].text: (row[2].text, row[3].text, row[4].text, row[4].tag) for row in table.rows}
    assert shown == {
        "a|b": ("2.500", "2.000", "−0.500 ± 0.010 ▼", "good"),
        "c/d": ("2.500", "2.562", "+0.062 ± 0.010 ▲", "bad"),
        "e": ("2.500", "2.485", "−0.015 ± 0.010", ""),
        "language ko": ("2.500", "2.375", "−0.125 ± 0.010 ▼", "good"),
        "all": ("2.500", "2.250", "−0.250 ± 0.010 ▼", "good"),
    }
    words = Page(write_report(run)).words
    assert "Held out, sft-1" in words
    assert "2.5 → 2.25" in words  # of the stage, among all stages


def test_a_stage_whose_held_out_data_is_of_one_source_has_its_change_among_the_stages_alone(run: Path) -> None:
    done = Done.read(run / "sft-1" / "done.json")
    alone = {"all": {"items": 9, "before": 2.5, "after": 2.25, "difference": -0.25, "error": None, "better": None}}
    done.model_copy(update={"heldout": {"loss": 2.25}, "heldout_change": alone}).write(run / "sft-1" / "done.json")
    assert by_source(read_run(run)) == []
    assert "2.5 → 2.25" in Page(write_report(run)).words


def test_page_needs_nothing_from_outside(run: Path) -> None:
    path = write_report(run)

    assert all(reference.startswith("#") for reference in Page(path).references)
    urls = set(re.findall(r"https?://[^\s\"'<]+", path.read_text(encoding="utf-8")))
    assert urls <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in path.read_text(encoding="utf-8")


def test_text_of_the_run_stays_text(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")

    assert "alert(1)</script>" not in html
    assert html.count("<script>") == 1


def test_page_follows_light_and_dark(run: Path) -> None:
    assert "prefers-color-scheme: dark" in write_report(run).read_text(encoding="utf-8")


def test_interrupted_run_shows_what_is_there(tmp_path: Path) -> None:
    write_recipe(tmp_path / "run")
    write_stage(tmp_path / "run", "pretrain-1", "next_token")
    write_stage(tmp_path / "run", "sft-1", "sft", steps=3, done=False)
    with (tmp_path / "run" / "sft-1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')

    page = Page(write_report(tmp_path / "run"))

    assert page.headings == ["Stages", "Curves", "Experts", "Settings"]
    assert "1 of 3" in page.words
    assert "sft-1 (interrupted)" in page.words
    assert "Not finished: sft-1" in page.words


def test_one_stage_without_recipe_or_summary(tmp_path: Path) -> None:
    write_stage(tmp_path / "run", "dpo-9", "dpo")

    page = Page(write_report(tmp_path / "run"))

    assert "dpo-9: rewards and their margin" in page.words
    assert "1 of 1" in page.words


def test_a_stage_on_labelled_answers_has_their_figures(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "judge"
    write_stage(tmp_path / "run", "judge", "kto")
    labels = {"desirable": 30, "undesirable": 1090, "ratio": 0.0275}
    found = [{"check": "one_label", "store": "training", "count": 1090, "looked_at": 1120, "allowed": 0.99, "first": ""}]
    ChecksFile(fingerprint="f", findings=found, lengths=[], labels=labels).write(stage / "checks.json")
    page = Page(write_report(tmp_path / "run"))
    for text in (
        "of the commoner label", "judge: rewards and their margin", "judge: log-probabilities",
        "judge: divergence from the reference", "undesirable", "KTO",
        "30 good and 1,090 bad answers, together weighed 0.03 to 1",
    ):  # fmt: skip
        assert text in page.words, text
    assert "pairs ranked right" not in page.words


def test_recipe_before_its_first_step(tmp_path: Path) -> None:
    write_recipe(tmp_path / "run")

    page = Page(write_report(tmp_path / "run"))

    assert page.headings == ["Settings"]
    assert "0 of 3" in page.words


@pytest.mark.parametrize(
    "figures", [{}, {"accuracy": 0.618}, {"bits_per_byte": []}, {"polite_rate": 0.25}, {"by_task": {"a": 1.0}}]
)
def test_partial_evaluations_have_their_figures(run: Path, figures: dict[str, Any]) -> None:
    summary = Summary.read(run / "summary.json")
    summary.model_copy(update={"evaluation": figures}).write(run / "summary.json")

    words = Page(write_report(run)).words
    assert ("61.8%" in words) == ("accuracy" in figures)
    assert ("25.0%" in words) == ("polite_rate" in figures)


def test_repeated_steps_of_a_resumed_stage_count_once(tmp_path: Path) -> None:
    write_stage(tmp_path / "run", "sft-1", "sft", steps=5, done=False)
    with (tmp_path / "run" / "sft-1" / "metrics.jsonl").open("a") as file:
        for step in (3, 4, 5):
            file.write(line_text({"step": step, "loss": 9.0, "tokens": 100 * (step + 1)}))

    [stage] = read_run(tmp_path / "run").stages

    assert stage.series("loss") == ([0, 1, 2, 3, 4, 5], [2.0, 1.0, 2 / 3, 9.0, 9.0, 9.0])
    assert stage.total("tokens") == 600


def test_values_that_are_not_finite_do_not_break_the_page(tmp_path: Path) -> None:
    write_stage(tmp_path / "run", "sft-1", "sft", steps=5, done=False)
    with (tmp_path / "run" / "sft-1" / "metrics.jsonl").open("a") as file:
        file.write(line_text({"step": 5, "loss": math.nan, "gradient_norm": math.inf, "tokens": 100}))

    Page(write_report(tmp_path / "run"))


def test_a_step_that_was_left_out_on_request_is_no_missing_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no loss."""
    write_recipe(tmp_path / "run")
    write_stage(tmp_path / "run", "pretrain-1", "next_token", steps=12)
    path = tmp_path / "run" / "pretrain-1" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[5] = line_text({"step": 5, "skipped": "asked", "learning_rate": 1e-3, "tokens": 500, "seconds": 2.5})
    path.write_text("".join(lines))

    words = Page(write_report(tmp_path / "run")).words

    assert "12 (1 left out)" in words
    assert "Left out were the steps pretrain-1 5 (asked for)." in words
    assert "missing" not in capsys.readouterr().out


def test_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        write_report(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_damaged_summary_is_named(run: Path) -> None:
    (run / "summary.json").write_text('{"recipe": ')

    with pytest.raises(UserError, match=r"summary\.json: damaged"):
        write_report(run)


def test_trained_parameters_are_shown_only_where_a_stage_trained_fewer_than_there_are(run: Path) -> None:
    assert "trained parameters" not in Page(write_report(run)).words
    done = Done.read(run / "sft-1" / "done.json")
    done.model_copy(update={"trained": 77}).write(run / "sft-1" / "done.json")

    assert "trained parameters" in Page(write_report(run)).words


def test_where_preferences_have_another_loss_nothing_is_said_of_where_it_starts(run: Path) -> None:
    assert "starts at ln 2" in Page(write_report(run)).words
    recipe = yaml.safe_load(read_checked_text(run / "recipe.yaml"))
    recipe["stages"][-1]["dpo"] = {"loss": "rpo"}
    write_checked_text(run / "recipe.yaml", yaml.safe_dump(recipe))

    assert "starts at ln 2" not in Page(write_report(run)).words


def test_where_a_loss_starts_is_said_of_the_objectives_that_were_trained(run: Path, tmp_path: Path) -> None:
    assert "KTO" not in Page(write_report(run)).words
    write_stage(tmp_path / "judged", "judge", "kto")
    page = Page(write_report(tmp_path / "judged"))
    assert "the KTO loss starts at 0.5" in page.words
    assert "DPO" not in page.words
    settings = {"name": "judge", "objective": "kto", "kto": {"desirable_weight": 2.0}}
    write_checked_text(tmp_path / "judged" / "judge" / "stage.yaml", yaml.safe_dump(settings))
    assert "starts at 0.5" not in Page(write_report(tmp_path / "judged")).words
