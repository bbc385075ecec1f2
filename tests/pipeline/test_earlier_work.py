"""What becomes of earlier work when settings change: it is gone on from where that gives the same, else kept, and always said."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from keural.files import read_json
from keural.recipe import TrainSpec
from keural.train.stage.step_plan import StepPlan, why_not_continued


def test_changed_settings_say_what_changed_and_that_the_checkpoint_is_not_used(interrupted: Any) -> None:
    said = interrupted.again("--until", "chat", "chat.train.lr=5e-4")
    assert "chat: it was begun with other settings (train.lr: 0.001 -> 0.0005)" in said
    assert f"kept as {interrupted.run / 'chat.old-1'}" in said
    assert "its checkpoints are not used" in said
    assert (interrupted.run / "chat.old-1" / "checkpoints" / "step-00000004").is_dir()


def test_a_finished_stage_and_those_after_it_say_it_too(place: Any) -> None:
    said = place.again("chat.train.weight_decay=0.2")
    assert "chat: it was finished with other settings (train.weight_decay: its default -> 0.2)" in said
    assert "align: it was finished with other settings (the model that it starts from)" in said


def test_other_data_is_named(interrupted: Any) -> None:
    data = interrupted.root / "data"
    shutil.copytree(Path(read_recipe(interrupted)["data"]), data)
    chats = data / "chats.jsonl"
    chats.write_text("".join(chats.read_text().splitlines(keepends=True)[:-5]))
    assert "other settings (the contents of its data)" in interrupted.again("--until", "chat", f"data={data}")


def read_recipe(place: Any) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load((place.root / "recipe" / "recipe.yaml").read_text()))


@pytest.mark.parametrize(
    "settings",
    [
        ("train.micro_batch_tokens=128", "train.recompute=full"),
        ("train.save_every=1", "train.keep_checkpoints=3", "train.evaluate_every=2"),
        ("chat.notes=[said later]",),
    ],
)
def test_settings_that_only_cut_the_work_or_keep_more_of_it_resume(settings: tuple[str, ...], interrupted: Any) -> None:
    said = interrupted.again("--until", "chat", *settings)
    assert "steady: finished already" in said
    assert "chat: resumed at step 4 of 6" in said
    assert not list(interrupted.run.glob("*.old-*"))


@pytest.mark.parametrize("interrupted_first", [False, True])
def test_a_stage_whose_learning_rate_stays_can_be_made_longer(
    interrupted_first: bool, place: Any, finished: Path, tmp_path: Path
) -> None:
    if interrupted_first:
        for name in ("model", "checkpoints"):
            shutil.rmtree(place.run / "steady" / name)
        (place.run / "steady" / "done.json").unlink()
    said = place.again("--until", "steady", "steady.train.steps=9")
    assert ("steady: resumed at step 6 of 9" in said) != interrupted_first
    assert "its steps changed (train.steps: 6 -> 9)" in said
    assert not list(place.run.glob("*.old-*"))
    assert read_json(place.run / "steady" / "done.json")["steps"] == 9
    lengthened = place.weights("steady")
    code, _, err = place("--until", "steady", "steady.train.steps=9", out=tmp_path / "whole")
    assert code == 0, err
    assert (tmp_path / "whole" / "steady" / "model" / "model.safetensors").read_bytes() == lengthened


def test_one_whose_learning_rate_falls_cannot_and_says_why(place: Any) -> None:
    said = place.again("--until", "chat", "chat.train.steps=9")
    assert "train.steps: 6 -> 9" in said
    assert "the learning rate would have been another from step 3 on" in said
    assert (place.run / "chat.old-1" / "done.json").is_file()


def test_when_a_plan_is_the_beginning_of_another() -> None:
    spec = TrainSpec(steps=20, batch_tokens=64, lr=1e-3)
    assert why_not_continued(StepPlan(10, 4), StepPlan(20, 4), 4, spec) is None
    assert why_not_continued(StepPlan(10, 4), StepPlan(20, 4), 5, spec) is None  # the first step after warm-up is the peak
    assert "from step 5 on" in str(why_not_continued(StepPlan(10, 4), StepPlan(20, 4), 6, spec))
    assert "from step 0 on" in str(why_not_continued(StepPlan(10, 4), StepPlan(10, 5), 1, spec))
    spec = TrainSpec(steps=20, batch_tokens=64, lr=1e-3, min_lr=1e-3)
    assert why_not_continued(StepPlan(10, 4), StepPlan(20, 4), 10, spec) is None
    assert why_not_continued(StepPlan(10, 4), StepPlan(8, 4), 8, spec) is None
    assert "10 steps are done already, more than 8" in str(why_not_continued(StepPlan(10, 4), StepPlan(8, 4), 10, spec))
