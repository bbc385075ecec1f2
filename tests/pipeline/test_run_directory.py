"""What a command believes of a run directory, and what it may replace there: only what was checked, only what is its own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keural.errors import UserError
from keural.files import read_json
from keural.pipeline.run_contents import read_run
from keural.pipeline.run_directory import Done, changes, set_aside
from keural.pipeline.scores import ScoresFile
from keural.report.html import render
from keural.train.reference.records import RECORD, RECORDS

Damage = Callable[..., None]


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when a path is replaced or written, and not when it is read (the time of the last access does)."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class TestAnothersFiles:
    """Only what this package has made is replaced, renamed or removed."""

    @pytest.mark.parametrize("name", ["final/thesis.tex", "tokenizer/x", "data/x", "chat/x", "recipe.yaml", "report.html", "x"])
    def test_a_directory_that_holds_anything_else_is_refused_and_left_as_it_is(self, place: Any, name: str) -> None:
        project = place.root / "project"
        (project / name).parent.mkdir(parents=True)
        (project / name).write_text("years of work")
        assert "give another --out" in place.refused(out=project)
        assert [path for path in project.rglob("*") if path.is_file()] == [project / name]
        assert (project / name).read_text() == "years of work"

    @pytest.mark.parametrize("command", [("data", "prepare"), ("tokenizer", "train")])
    def test_so_do_the_other_commands_that_write_there(self, place: Any, command: tuple[str, str]) -> None:
        project = place.root / "project"
        (project / "data").mkdir(parents=True)
        (project / "data" / "measured.csv").write_text("1,2")
        code, _, err = place.command(*command, place.root / "recipe", "--out", project)
        assert code == 2
        assert "no run directory" in err
        place.command("data", "stats", place.root / "recipe", "--out", project)
        assert [path for path in project.rglob("*") if path.is_file()] == [project / "data" / "measured.csv"]

    def test_the_recipe_itself_is_no_run_directory(self, place: Any) -> None:
        before = (place.root / "recipe" / "recipe.yaml").read_bytes()
        assert "holds a recipe" in place.refused(out=place.root / "recipe")
        assert (place.root / "recipe" / "recipe.yaml").read_bytes() == before

    def test_an_empty_directory_becomes_one(self, place: Any) -> None:
        (place.root / "new").mkdir()
        (place.root / "new" / ".gitkeep").touch()
        code, _, err = place("--until", "steady", out=place.root / "new")
        assert code == 0, err

    @pytest.mark.parametrize("make", ["directory", "file", "link"])
    def test_what_is_called_final_and_is_not_the_runs_link_stays(self, place: Any, make: str) -> None:
        final, own = place.run / "final", place.root / "own"
        final.unlink()
        own.mkdir()
        {"directory": final.mkdir, "file": final.touch, "link": lambda: final.symlink_to(own)}[make]()
        before = _identity(final)
        assert "final: is in the way" in place.refused()
        assert _identity(final) == before

    @pytest.mark.parametrize("name", ["align", "tokenizer"])
    def test_a_directory_in_a_run_that_no_run_has_made_is_in_the_way(self, place: Any, name: str) -> None:
        shutil.rmtree(place.run / name)
        (place.run / name).mkdir()
        (place.run / name / "notes.txt").write_text("mine")
        assert f"{name}: is in the way" in place.refused()
        assert (place.run / name / "notes.txt").read_text() == "mine"

    def test_prepared_data_that_is_none_is_in_the_way(self, place: Any) -> None:
        prepared = next((place.run / "data").glob("*/prepared.json"))
        prepared.unlink()
        assert "is in the way" in place.refused()
        shutil.rmtree(prepared.parent)  # as it says
        place.again()

    def test_what_is_set_aside_takes_no_name_that_is_used(self, tmp_path: Path) -> None:
        (tmp_path / "chat").mkdir()
        (tmp_path / "chat.old-1").symlink_to("nowhere")
        assert set_aside(tmp_path / "chat") == tmp_path / "chat.old-2"


class TestEarlierVersions:
    """A run whose files state no checksums is refused with the reason."""

    def test_a_run_without_a_marker(self, place: Any) -> None:
        (place.run / "run.json").unlink()
        recipe = place.run / "recipe.yaml"
        recipe.write_text(recipe.read_text().partition("\n")[2])
        assert "a run of an earlier version of keural" in place.refused()

    def test_a_run_of_another_format(self, place: Any, change: Damage) -> None:
        change(place.run / "run.json", format=99, keural="9.0")
        assert "a run of keural 9.0" in place.refused()

    @pytest.mark.parametrize("command", [("data", "prepare"), ("tokenizer", "train")])
    def test_a_marker_that_is_gone_is_proved_after_every_command(self, place: Any, command: tuple[str, str]) -> None:
        arguments = (*command, place.root / "recipe", "--out", place.root / "new")
        assert place.command(*arguments)[0] == 0
        (place.root / "new" / "run.json").write_text("[]")
        assert place.command(*arguments)[0] == 2
        (place.root / "new" / "run.json").unlink()  # as it says
        assert place.command(*arguments)[0] == 0

    def test_a_marker_that_is_gone_is_proved_by_the_recipe_that_the_run_wrote(self, place: Any, damage: Damage) -> None:
        damage(place.run / "run.json", 30)
        assert "run.json: damaged" in place.refused()
        (place.run / "run.json").unlink()  # as it says
        assert "finished already" in place.again()
        assert (place.run / "run.json").is_file()


MARKERS = ["chat/done.json", "align/done.json", "evaluation.json", "tokenizer/done.json", "data/*/prepared.json"]


class TestChecked:
    """Every file is what was written, or the command says which one is not, and what it advises works."""

    @pytest.mark.parametrize("marker", MARKERS)
    def test_one_changed_character_of_a_marker_is_refused(self, marker: str, place: Any) -> None:
        [path, *_] = sorted(place.run.glob(marker))
        path.write_text(path.read_text().replace("1", "2", 1) if "1" in path.read_text() else path.read_text().replace("a", "b", 1))
        assert f"{path}: damaged (its checksum differs); delete" in place.refused()

    @pytest.mark.parametrize("marker", [*MARKERS, "run.json"])
    @pytest.mark.parametrize("content", ["[]", "{}", "", '{"fingerprint": 3}', '{"checksum": "x"}', "null"])
    def test_nothing_of_the_kind_is_refused(self, marker: str, content: str, place: Any) -> None:
        [path, *_] = sorted(place.run.glob(marker))
        path.write_text(content)
        assert str(path) in place.refused()

    def test_a_marker_of_wrong_types_with_the_right_checksum_is_refused(self, place: Any, change: Damage) -> None:
        change(place.run / "chat" / "done.json", heldout=[1])
        assert "chat/done.json: of another version of keural (key 'heldout'" in place.refused()

    @pytest.mark.parametrize("marker", ["chat/done.json", "evaluation.json"])
    def test_deleting_a_damaged_marker_makes_it_again(self, marker: str, place: Any, damage: Damage) -> None:
        before = read_json(place.run / marker)
        weights = place.weights("chat")
        damage(place.run / marker, 30)
        assert marker in place.refused()
        (place.run / marker).unlink()
        place.again()
        assert read_json(place.run / marker).keys() == before.keys()
        assert place.weights("chat") == weights
        assert not list(place.run.glob("*.old-*"))

    def test_a_damaged_stage_marker_is_refused_and_made_again_from_the_checkpoint(self, interrupted: Any, damage: Damage) -> None:
        stage = interrupted.run / "chat" / "stage.json"
        damage(stage, 30)
        assert "chat/stage.json: damaged" in interrupted.refused("--until", "chat")
        stage.unlink()
        assert "resumed at step 4 of 6" in interrupted.again("--until", "chat")
        assert not list(interrupted.run.glob("*.old-*"))

    @pytest.mark.parametrize("name", ["steady/checks.json", "evaluation.json", "results/scores.json", "results/m/t.jsonl"])
    def test_what_is_read_after_training_is_refused_before_a_step(self, interrupted: Any, damage: Damage, name: str) -> None:
        path, metrics = interrupted.run / name, interrupted.run / "chat" / "metrics.jsonl"
        if name.startswith("results"):
            path.parent.mkdir(parents=True)
            ScoresFile(trained={}, stages={}).write(path)
        before = metrics.read_bytes()
        damage(path, 30)
        assert f"{path}:" in interrupted.refused("--until", "chat")
        assert metrics.read_bytes() == before

    def test_before_the_first_checkpoint_it_begins_again(self, interrupted: Any, damage: Damage, finished: Path) -> None:
        shutil.rmtree(interrupted.run / "chat" / "checkpoints")
        damage(interrupted.run / "chat" / "stage.json", 30)
        interrupted.refused("--until", "chat")
        (interrupted.run / "chat" / "stage.json").unlink()
        assert "others, which are not known" in interrupted.again("--until", "chat")
        assert interrupted.weights("chat") == (finished / "run/chat/model/model.safetensors").read_bytes()

    def test_a_stage_that_was_killed_before_its_first_file_begins(self, interrupted: Any) -> None:
        shutil.rmtree(interrupted.run / "chat")
        (interrupted.run / "chat").mkdir()
        (interrupted.run / "chat" / ".stage.json.1-00000000.tmp").touch()
        interrupted.again("--until", "chat")

    def test_a_damaged_plan_is_refused_and_made_again(self, interrupted: Any, finished: Path) -> None:
        plan = interrupted.run / "chat" / "plan.json"
        plan.write_text(plan.read_text().replace('"steps": 6', '"steps": 7'))
        shutil.rmtree(interrupted.run / "chat" / "checkpoints")
        assert "chat/plan.json: damaged" in interrupted.refused("--until", "chat")
        plan.unlink()
        interrupted.again("--until", "chat")
        assert interrupted.weights("chat") == (finished / "run/chat/model/model.safetensors").read_bytes()

    def test_a_damaged_memory_of_checksums_sets_nothing_aside(self, place: Any) -> None:
        cache = place.run / "data" / "file-hashes.json"
        os.utime(place.root / "recipe")
        cache.write_text('{"checksum": "x", "files": {}}')
        said = place.again()
        assert "file-hashes.json: damaged" in said
        assert said.count("finished already") == 3
        assert not list(place.run.glob("*.old-*"))

    def test_held_out_texts_are_compared_before_they_are_measured(self, place: Any) -> None:
        (place.run / "evaluation.json").unlink()
        [texts] = place.run.glob("data/*/heldout/texts.jsonl")
        texts.write_text(texts.read_text().replace("sea", "zqw"))
        assert f"{texts}: checksum differs" in place.refused()
        shutil.rmtree(texts.parent)  # as it says
        assert "the data is prepared again" in place.again()

    @pytest.mark.parametrize("key", ["sources", "sections", "files", "num_tokens"])
    def test_every_key_of_a_stores_manifest_is_checked(self, key: str, place: Any) -> None:
        manifests = list(place.run.glob("data/*/train/manifest.json"))
        for path in manifests:
            content = json.loads(path.read_text())
            path.write_text(json.dumps(content | {key: []}))
        code, _, err = place()
        assert code == 2
        assert all(f"{path}: damaged (its checksum differs)" in err for path in manifests)

    @pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.model", "done.json"])
    def test_a_tokenizer_is_all_of_its_files(self, name: str, place: Any, damage: Damage) -> None:
        before = (place.run / "tokenizer" / "tokenizer.model").read_bytes()
        damage(place.run / "tokenizer" / name, 40)
        assert f"{name}: damaged" in place.refused()
        shutil.rmtree(place.run / "tokenizer")  # as it says
        assert place.again().count("finished already") == 3
        assert (place.run / "tokenizer" / "tokenizer.model").read_bytes() == before


class TestModels:
    """A finished stage whose model is damaged or gone is not finished."""

    @pytest.mark.parametrize("harm", ["flipped", "gone", "no record"])
    @pytest.mark.parametrize("stage", ["chat", "align"])
    def test_it_is_made_again_from_its_last_checkpoint_and_that_is_said(
        self, harm: str, stage: str, place: Any, damage: Damage
    ) -> None:
        before, model = place.weights(stage), place.run / stage / "model"
        if harm == "flipped":
            damage(model / "model.safetensors")
        elif harm == "gone":
            shutil.rmtree(model)
        else:
            (model / "keural.json").unlink()
        said = place.again()
        assert f"{stage}: was finished, but its model is" in said
        assert f"{stage}: resumed at step 6 of 6" in said
        assert said.count("finished already") == 2
        assert place.weights(stage) == before
        assert place.again().count("finished already") == 3

    def test_without_checkpoints_it_is_trained_again(self, place: Any) -> None:
        before = place.weights("align")
        shutil.rmtree(place.run / "align" / "model")
        shutil.rmtree(place.run / "align" / "checkpoints")
        place.again()
        assert place.weights("align") == before

    def test_a_stage_alone_says_what_is_wrong_with_the_one_before_and_the_advice_works(self, place: Any, damage: Damage) -> None:
        damage(place.run / "chat" / "model" / "model.safetensors")
        (place.run / "align" / "done.json").unlink()
        align, chat = (place.root / "recipe" / f"{name}.yaml" for name in ("align", "chat"))
        code, _, err = place.command("train", align, "--out", place.run)
        assert code == 2
        assert "its model is damaged" in err
        assert "run that stage first" in err
        assert place.command("train", chat, "--out", place.run)[0] == 0
        assert place.command("train", align, "--out", place.run)[0] == 0

    def test_a_model_that_is_gone_is_not_what_final_points_to(self, place: Any) -> None:
        shutil.rmtree(place.run / "align" / "model")
        place.again("--until", "steady")
        assert (place.run / "final").readlink() == Path("chat/model")

    def test_files_that_have_not_changed_are_not_read_again(self, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for path in place.run.glob("*/model/*"):
            os.utime(path, ns=(1, 1))
        monkeypatch.setattr("keural.files.SETTLED_NS", -1)  # as if it had been some time ago
        place.again()
        monkeypatch.setattr("keural.pipeline.stage_directory.check_sums", lambda directory: 1 / 0)
        place.again("--until", "steady")
        (place.run / "chat" / "model" / "added.safetensors").touch()
        with pytest.raises(ZeroDivisionError):
            place.again()


class TestReport:
    """A report shows what was written, or says what it leaves out."""

    def test_damaged_lines_of_metrics_are_left_out_and_that_is_said(self, place: Any, capfd: pytest.CaptureFixture[str]) -> None:
        path = place.run / "chat" / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([lines[0].replace("loss", "lass"), *lines[1:], '{"step": 9, "lo']))
        run = read_run(place.run)
        said = capfd.readouterr().out
        assert "1 lines are damaged" in said
        assert "1 of 6 steps are missing" in said
        assert [step["step"] for step in run.stages[1].steps] == [1, 2, 3, 4, 5]
        assert "<svg" in render(run)

    @pytest.mark.parametrize("name", ["recipe.yaml", "summary.json", "chat/done.json"])
    def test_a_damaged_file_is_refused(self, name: str, place: Any, damage: Damage) -> None:
        damage(place.run / name, 150)
        with pytest.raises(UserError, match=name):
            read_run(place.run)


def test_reference_values_of_a_pass_that_was_killed_are_checked_one_by_one(place: Any, finished: Path) -> None:
    align = place.run / "align"
    for name in ("model", "checkpoints"):
        shutil.rmtree(align / name)
    (align / "done.json").unlink()
    (path,) = (place.run / "reference").glob(f"*/{RECORDS}")
    records = np.fromfile(path, dtype=RECORD)
    records["values"][0] += 8
    records["pair"][1] ^= 1
    records["values"][2] = np.nan
    path.write_bytes(records.tobytes() + b"half")
    assert "pairs.bin: 3 records are damaged, and their values computed again" in place.again()
    assert place.weights("align") == (finished / "run/align/model/model.safetensors").read_bytes()


def test_what_changed_is_told_key_by_key() -> None:
    def settings(**train: Any) -> dict[str, Any]:
        sources = [{"name": "prose", "path": "a"}]
        return {"stage": {"train": train, "data": {"sources": sources}}, "seed": 1, "data": "0" * 64, "init": "random"}

    old = settings(lr=0.001, steps=6)
    assert changes(old, settings(lr=0.0005, steps=6)) == ["train.lr: 0.001 -> 0.0005"]
    assert changes(old, settings(lr=0.001, steps=6, clip_norm=2.0)) == ["train.clip_norm: its default -> 2.0"]
    assert changes(old, old | {"seed": 2, "init": "x"}) == ["seed: 1 -> 2", "the model that it starts from"]
    other = settings(lr=0.001, steps=6) | {"data": "1" * 64}
    assert changes(old, other) == ["the contents of its data"]
    other["stage"]["data"]["sources"][0]["path"] = "b"
    assert changes(old, other) == ["data.sources.prose.path: a -> b"]


def test_a_marker_reads_back_as_it_was_written(tmp_path: Path) -> None:
    done = Done(
        name="chat", objective="sft", init_from="base", fingerprint="f", init="i", seconds=1.5, tokens=3, steps=2,
        loss_first=float("inf"), loss_last=0.1, heldout={"loss": 1e-30},
    )  # fmt: skip
    done.write(tmp_path / "done.json")
    assert Done.read(tmp_path / "done.json") == done
