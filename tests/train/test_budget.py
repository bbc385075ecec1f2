"""`train.recompute: budget`: what each layer keeps is chosen by the planned memory, and changes no number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from keural.errors import UserError
from keural.files import read_json
from keural.recipe import ModelSpec
from keural.train.memory.activations import Mix
from keural.train.memory.budget import best_mix, with_mix
from keural.train.memory.network import Network, network_of_config
from keural.train.memory.parts import ERROR, GIB, Layout, memory
from keural.train.memory.stage import layout_of, own_layout
from keural.train.processes.ranks import Ranks
from keural.train.stage.kept import choose_kept
from keural.train.stage.step_plan import PlanFile
from tests.helpers.train_small import LENGTH, losses_of, open_run, small_config, small_job, small_stage, step_gradients, train_stage

LAYERS = 4
REAL = Network(ModelSpec(), 131_074)
CPU = Ranks(0, 1, torch.device("cpu"))
TRAIN: dict[str, Any] = {"micro_batch_tokens": 4 * LENGTH}
ROUTER = {"balance_coef": 0.5, "z_coef": 0.1}


def real_layout(compiled: bool = True, gpus: int = 1, precision: str = "split-host") -> Layout:
    stage = small_stage(train={"compute_dtype": "bfloat16"})
    return layout_of(stage, gpus, precision=precision, recompute="budget", compiled=compiled, tokens=16_384)


def taken(layout: Layout, mix: Mix) -> float:
    return memory(REAL, with_mix(layout, mix)).total


def gib_for(mix: Mix) -> float:
    """`train.memory_gib` with which a small job's layers keep just this."""
    stage, config = budget_stage(1.0), small_config(num_hidden_layers=LAYERS)
    planned = memory(network_of_config(config), with_mix(own_layout(stage, 1), mix))
    gib = (planned.total - planned.parts["slack"]) * ERROR / GIB + 1e-9
    kept = choose_kept(budget_stage(gib), config, CPU)
    assert kept is not None
    assert kept.mix == mix
    return gib


def budget_stage(gib: float) -> Any:
    return small_stage(train=TRAIN | {"recompute": "budget", "memory_gib": gib})


def job_with(directory: Path, run: str, **train: Any) -> Any:
    return small_job(directory, run=run, layers=LAYERS, router=ROUTER, train=TRAIN | train)


MIXES = (Mix(full=2, selective=2), Mix(full=1, selective=3), Mix(selective=2, none=2), Mix(none=4))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("gpus", [1, 8])
def test_the_mix_fits_and_the_next_larger_one_does_not(compiled: bool, gpus: int) -> None:
    layout = real_layout(compiled, gpus, "split-host" if gpus == 1 else "fp32-bf16m")
    least = min(taken(layout, Mix(full=number, selective=24 - number)) for number in range(25)) * ERROR
    most = taken(layout, Mix(selective=24) if compiled else Mix(none=24)) * ERROR
    found = [best_mix(REAL, layout, least + share / 20 * (most - least)) for share in range(21)]

    assert found[0] is not None
    assert found[0].full >= 20
    assert found[-1] == (Mix(selective=24) if compiled else Mix(none=24))
    assert found == sorted(found, key=lambda mix: (-mix.full, -mix.selective) if mix else ())
    for share, mix in enumerate(found):
        assert mix is not None
        limit = least + share / 20 * (most - least)
        assert taken(layout, mix) * ERROR <= limit
        if (more := larger(mix, compiled)) is not None:
            assert taken(layout, more) * ERROR > limit
    assert len(set(found)) > 10
    assert best_mix(REAL, layout, least - 1) is None


def larger(mix: Mix, compiled: bool) -> Mix | None:
    """The mix with one layer more that keeps more."""
    if mix.full:
        return Mix(mix.full - 1, mix.selective + 1, mix.none)
    return None if compiled or not mix.selective else Mix(0, mix.selective - 1, mix.none + 1)


def test_layers_that_keep_least_come_first() -> None:
    """The other way round the last layer would be run again while all others still hold what they keep."""
    assert Mix(1, 2, 1).modes == ("full", "selective", "selective", "none")
    assert str(Mix(1, 2, 0)) == "1 full, 2 selective"


def test_every_mix_gives_the_losses_gradients_and_routing_of_none(tmp_path: Path) -> None:
    expected_losses, expected = step_gradients(open_run(job_with(tmp_path, "none")).trainer)
    for number, mix in enumerate(MIXES):
        run = open_run(job_with(tmp_path, f"{number}", recompute="budget", memory_gib=gib_for(mix)))
        engine: Any = run.trainer.policy.engine
        assert engine.recompute == mix.modes
        losses, gradients = step_gradients(run.trainer)
        assert torch.equal(losses["counts"], expected_losses["counts"])
        for name, value in (expected_losses | expected).items():
            found = (losses | gradients)[name]
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5 * max(float(value.abs().max()), 1e-3))


def test_the_choice_is_said_and_written_down_and_another_one_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"steps": 4, "save_every": 2, "keep_checkpoints": 2}
    whole = job_with(tmp_path, "whole", **settings)
    train_stage(whole)
    first = job_with(tmp_path, "run", **settings, recompute="budget", memory_gib=gib_for(MIXES[1]))
    train_stage(first)
    file = first.run_dir / "plan.json"
    assert "small: recompute budget: 1 full, 3 selective of 4 layers, planned 0.0" in capsys.readouterr().out
    assert PlanFile.read(file).layers == {"full": 1, "selective": 3, "none": 0}

    last = first.run_dir / "checkpoints" / "step-00000004"
    last.rename(last.with_name("moved-away"))
    train_stage(job_with(tmp_path, "run", **settings, recompute="budget", memory_gib=gib_for(MIXES[2])))

    assert PlanFile.read(file).layers == {"full": 0, "selective": 2, "none": 2}
    assert losses_of(first) == pytest.approx(losses_of(whole), abs=1e-5)
    assert read_json(whole.run_dir / "plan.json")["layers"] is None


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"recompute": "budget"}, "goes by an accelerator's memory, and there is none; give train.memory_gib"),
        ({"recompute": "budget", "memory_gib": 1e-6}, "with all layers in full a step takes 0.0"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_anything_is_written(tmp_path: Path, train: dict[str, Any], said: str) -> None:
    job = job_with(tmp_path, "run", **train)
    with pytest.raises(UserError, match=said) as error:
        train_stage(job)
    assert "\n" not in str(error.value)
    assert not (job.run_dir / "plan.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"memory_gib": 10}}, "memory_gib has no effect with recompute none"),
        ({"train": {"recompute": "budget", "memory_gib": 0}}, "greater than 0"),
        ({"train": {"recompute": "budget", "memory_gib": float("nan")}}, "memory_gib"),
        ({"train": {"recompute": "budget", "compile": True}}, "recompute budget with compile needs compute_dtype bfloat16"),
        ({"lora": {"rank": 8}, "train": {"recompute": "budget"}}, "plans do not count adapters"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small_stage("sft", **changes)


def test_a_processor_has_no_context_that_counts() -> None:
    kept = choose_kept(budget_stage(1.0), small_config(num_hidden_layers=LAYERS), CPU)
    assert kept is not None
    assert kept.mix == Mix(none=LAYERS)
    assert 0 < kept.planned * GIB < 0.1 * GIB


def test_a_run_that_nobody_tells_how_much_memory_there_is_is_refused_before_data_is_prepared(
    tmp_path: Path, keural: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, error = keural("run", "toy", "train.recompute=budget", "--out", tmp_path / "run")
    assert code == 2
    assert "pretrain-1: train.recompute budget goes by an accelerator's memory, and there is none" in error
    assert not (tmp_path / "run").exists()
