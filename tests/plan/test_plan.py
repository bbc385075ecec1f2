"""`keural plan`: the mode that fits, time and cost, and what is refused."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keural.cli.app import app
from keural.cli.plan import command
from keural.errors import UserError
from keural.plan.choice import lay_out, overrides
from keural.plan.gpus import GPUS
from keural.plan.plan import Plan, Speed, make_plan, refusal
from keural.recipe import load_recipe
from keural.recipe.shipped import SHIPPED
from keural.train.memory.activations import kept, layer_work
from keural.train.memory.network import network_of

MACHINES = {
    "keural-14b-h200": ("split", 1),
    "keural-14b-h100": ("split-host", 1),
    "keural-14b-2xh200": ("fp32-bf16m", 2),
    "keural-14b-64xh100": ("fp32-bf16m", 64),
}
"""The recipes that are named after a machine: their precision, and how many cards it has."""
MUON = ["train.optimizer=muon", "train.precision=fp32"]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "planning.md"
H100 = {
    "check": {"device": {"name": "NVIDIA H100 80GB HBM3"}},
    "whole": {
        "full_16384": {"mfu_causal": 40.41},
        "selective_9_of_24_16384": {"mfu_causal": 43.62},
        "selective_24_of_24_8192": {"mfu_causal": 48.52},
        "optimizer": {"step_ms": [3428.9, 1441.9, 1440.6]},
    },
    "stack": {"none_compiled_16384": {"extrapolated_24": {"mfu_causal": 47.1}}},
    "baselines": {"present_bf16_weights": {"extrapolated_24": {"mfu_causal": 18.2}}},
}
"""A part of what `benchmarks/gpu.py` wrote on an H100."""


def planned(gpus: int, gpu: str, *changes: str, recipe: str = "keural-14b", **more: Any) -> Plan:
    return make_plan(load_recipe(SHIPPED / recipe, changes), gpu, gpus, **more)


def test_a_plan_as_data() -> None:
    result = CliRunner().invoke(app, ["plan", "keural-14b", "--gpus", "1", "--gpu", "h200", "--price", "3", "--json"])
    data = json.loads(result.stdout)

    assert result.exit_code == 0
    assert data["parameters"] == 14_832_054_272
    assert data["parameters_active"] == 4_866_387_968
    assert (data["precision"], data["recompute"], data["fits"]) == ("split", "full", True)
    parts = data["memory_gib"]
    assert sum(size for name, size in parts.items() if name != "total") == pytest.approx(parts["total"], abs=0.05)
    assert [stage["name"] for stage in data["stages"]] == ["pretrain-1", "pretrain-2", "sft", "dpo"]
    first = data["stages"][0]
    assert first["tokens"] == 125_000 * 524_288
    assert first["cost"] == pytest.approx(3 * first["gpu_hours"], rel=1e-4)
    assert data["total"]["hours"] == pytest.approx(sum(stage["hours"] for stage in data["stages"]), rel=1e-4)
    assert len(data["published"]["stages"]) == 7
    assert data["flops_per_token"]["6n_active"] == 6 * data["parameters_active"]


@pytest.mark.parametrize("recipe", ["keural-14b", "keural-14b-published"])
@pytest.mark.parametrize(
    ("gpus", "gpu", "precision"),
    [(1, "h200", "split"), (1, "h100", "split-host"), (2, "h200", "fp32-bf16m"), (64, "h100", "fp32-bf16m")],
)
def test_the_large_recipes_fit_as_they_are(recipe: str, gpus: int, gpu: str, precision: str) -> None:
    found = planned(gpus, gpu, recipe=recipe)

    assert found.fits
    assert {stage.laid.layout.precision for stage in found.stages} == {precision}
    changed = load_recipe(SHIPPED / recipe, found.overrides)
    assert overrides([stage.laid for stage in make_plan(changed, gpu, gpus).stages]) == []


class TestRecipesOfAMachine:
    @pytest.mark.parametrize(("name", "precision", "gpus"), [(name, *said) for name, said in MACHINES.items()])
    def test_fit_as_they_are_on_the_machine_that_they_name(self, name: str, precision: str, gpus: int) -> None:
        """The command stands at the head of the recipe; nothing is left to choose."""
        head = (SHIPPED / name / "recipe.yaml").read_text(encoding="utf-8").partition("name:")[0]
        [line] = re.findall(r"^#   keural plan (.*)$", head, re.MULTILINE)
        assert line.split()[0] == name
        result = CliRunner().invoke(app, ["plan", *shlex.split(line), "--json"])
        assert result.exit_code == 0
        data = json.loads(result.stdout)
        assert (data["fits"], data["gpus"], data["overrides"]) == (True, gpus, [])
        assert {(stage["precision"], stage["recompute"], stage["compile"]) for stage in data["stages"]} == {
            (precision, "selective", True)
        }
        assert f"run {name} data=DIR" in head

    @pytest.mark.parametrize("name", MACHINES)
    def test_differ_from_keural_14b_in_how_it_is_computed_alone(self, name: str) -> None:
        plain, ours = (load_recipe(SHIPPED / recipe) for recipe in ("keural-14b", name))
        own = {"precision", "recompute", "micro_batch_tokens", "compile", "shard_over"}
        assert ours.spec.model_copy(update={"name": "", "description": ""}) == plain.spec.model_copy(
            update={"name": "", "description": ""}
        )
        for mine, theirs in zip(ours.stages, plain.stages, strict=True):
            same = {key: value for key, value in theirs.train.model_dump().items() if key in own}
            assert mine.model_copy(update={"train": mine.train.model_copy(update=same)}) == theirs


def test_a_plan_for_a_thousand_says_what_is_idle() -> None:
    found = planned(1024, "h200", recipe="keural-14b-published")

    assert found.fits
    assert any("fewer rows than there are GPUs" in note for note in found.notes)


def test_a_small_model_needs_no_halves() -> None:
    found = planned(1, "h100", recipe="toy")

    assert found.fits
    assert {stage.laid.layout.precision for stage in found.stages} == {"fp32"}
    assert found.overrides == []


@pytest.mark.parametrize("line", re.findall(r"^    keural plan (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
def test_the_commands_of_the_page_fit(line: str) -> None:
    result = CliRunner().invoke(app, ["plan", *shlex.split(line), "--json"])

    assert result.exit_code == 0
    assert json.loads(result.stdout)["fits"]


def keys_of(value: Any, under: str = "") -> set[str]:
    """Every key of a plan as its page writes it: `total.hours`, `stages[].name`."""
    if isinstance(value, dict):
        return {key for name, inner in value.items() for key in keys_of(inner, f"{under}.{name}" if under else name)}
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return {key for each in value for key in keys_of(each, f"{under}[]")}
    return {under}


def test_the_page_has_the_keys_of_the_data_and_no_others() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("## As data")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    said = [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]
    changes = ["train.recompute=budget", "train.micro_batch_tokens=16384", "train.compile=true"]

    plan = planned(1, "h100", *changes)

    assert len(said) == len(set(said))
    assert set(said) == {re.sub(r"(stages\[\]\.layers)\..*", r"\1", key) for key in keys_of(plan.data())}


def test_what_is_left_open_is_chosen_for_speed() -> None:
    """Without recompute and sizes in the recipe, an H200 has room for selective layers at 8,192 tokens."""
    found = planned(1, "h200")

    assert any(
        "train.recompute=selective train.micro_batch_tokens=8192 train.compile=true takes" in note for note in found.notes
    ), found.notes


def test_a_budget_of_memory_is_shared_out_over_the_layers() -> None:
    """A card has room for some of the layers of long micro-batches to keep more than their input."""
    changes = ["train.recompute=budget", "train.micro_batch_tokens=16384", "train.compile=true", "router.load=lagged"]
    found = planned(1, "h100", *changes)
    data = found.data()

    assert found.fits
    assert (data["recompute"], sum(data["layers"].values())) == ("budget", 24)
    assert 5 <= data["layers"]["selective"] <= 15
    assert data["layers"]["none"] == 0  # compiled, it was measured to be slower
    full = planned(1, "h100", "train.recompute=full", *changes[1:]).stages[0]
    selective = planned(1, "h100", "train.recompute=selective", *changes[1:]).stages[0]
    assert full.rate.mfu < found.stages[0].rate.mfu < selective.rate.mfu
    less = planned(1, "h100", *changes, "train.memory_gib=72").data()["layers"]["selective"]
    assert less < data["layers"]["selective"]
    refused = refusal(planned(1, "h100", *changes, "train.memory_gib=64"))
    assert refused is not None
    assert "of which it may take 64.0; it fits with train.precision=split-host train.micro_batch_tokens=" in str(refused)


def test_a_mixture_runs_at_the_rates_of_its_layers(tmp_path: Path) -> None:
    """9 of 24 layers selective were measured at 43.6% (full 40.4%, selective 48.5%)."""
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(H100))
    changes = ["train.recompute=budget", "train.micro_batch_tokens=16384", "train.compile=true", "train.memory_gib=75.2"]
    stage = planned(1, "h100", *changes, speed=Speed(measured=file)).stages[0]

    assert stage.laid.layout.way.mix is not None
    assert stage.laid.layout.way.mix.selective == 9
    assert stage.rate.mfu == pytest.approx(0.436, rel=0.02)


def test_a_budget_is_chosen_where_not_all_layers_can_be_selective() -> None:
    """Rows of 16,384 tokens leave no smaller micro-batch."""
    long = ["model.max_position_embeddings=16384", "pretrain-1.data.sequence_length=16384"]
    recipe = load_recipe(SHIPPED / "keural-14b", long)
    first = lay_out(recipe, GPUS["h100"], 1, free=True)[0]

    assert (first.fits, first.settings["recompute"], first.settings["micro_batch_tokens"]) == (True, "budget", 16_384)
    assert "pretrain-1.train.recompute=budget" in overrides([first, *lay_out(recipe, GPUS["h100"], 1, free=True)[1:]])


def test_a_micro_batch_that_is_part_of_the_loss_is_left_as_it_is() -> None:
    found = planned(1, "h200", recipe="keural-14b-published")

    assert not any("micro_batch_tokens" in text for text in (*found.overrides, *found.notes))


def test_speed_at_a_stated_mfu() -> None:
    """40% on an H200 are 12.9K tokens/s."""
    stage = planned(1, "h200", speed=Speed(mfu=0.4)).stages[0]

    assert stage.cost.tokens_per_second == pytest.approx(12_900, rel=0.005)
    assert stage.hours == pytest.approx(65.536e9 / 12_900 / 3600, rel=0.005)


def test_speed_at_a_measured_mfu(tmp_path: Path) -> None:
    """A step of 262,144 tokens took 18.19 s on an H100, 14,408 tokens/s, in micro-batches of 8,192."""
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(H100))
    changes = ["train.recompute=selective", "train.compile=true", "train.micro_batch_tokens=8192", "router.load=lagged"]
    changes += ["pretrain-1.train.batch_tokens=262144"]

    stage = planned(1, "h100", *changes, speed=Speed(measured=file)).stages[0]

    assert stage.cost.tokens_per_second == pytest.approx(14_408, rel=0.01)
    assert str(file) in stage.rate.source


@pytest.mark.parametrize(
    ("content", "gpu", "said"),
    [
        (H100, "h200", "was measured on NVIDIA H100"),
        ({"stack": {"full_eager_512": {"extrapolated_24": {"mfu_causal": 0.0}}}}, "h100", "has no MFU of recompute full"),
        ({"whole": {"full_16384": 7, "selective_x": []}, "stack": [1], "check": None}, "h100", "has no MFU of recompute full"),
        ({"whole": {"full_16384": {"mfu_causal": "fast"}}}, "h100", "has no MFU of recompute full"),
    ],
)
def test_measurements_of_something_else_are_refused(tmp_path: Path, content: Any, gpu: str, said: str) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(content))

    with pytest.raises(UserError, match=said):
        planned(1, gpu, speed=Speed(measured=file))


def test_forward_passes_ahead_take_their_time() -> None:
    exact, lagged = (planned(1, "h200", f"router.load={load}").stages[0] for load in ("exact", "lagged"))

    assert exact.cost.seconds_per_step / lagged.cost.seconds_per_step == pytest.approx(1.22, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h20"], "did you mean 'h200'"),
        (
            ["--gpus", "2", "train.precision=split-host"],
            "split-host is for one process, and there are 2; set train.precision to split",
        ),
        (["sft.lora={rank: 16}"], "sft: trains adapters, which a plan does not count"),
        (["--gpus", "0"], "greater than or equal to 1"),
        (["--mfu", "40"], "is a share"),
        (["--mfu", "0.4", "--measured", "x.json"], "not both"),
        (["--measured", "nothing.json"], "nothing.json"),
        (["--price", "nan"], "--price"),
    ],
)
def test_refusals(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["plan", "keural-14b", *arguments])

    assert result.exit_code != 0
    assert said in (str(result.exception) + result.output)


@pytest.mark.parametrize(
    ("gpus", "gpu", "changes", "remedy"),
    [
        (2, "h100", ["train.precision=fp32-bf16m"], "it fits with train.precision=split"),
        (1, "h100", ["train.precision=split"], "it fits with train.precision=split-host"),
        (1, "h100", ["train.recompute=none"], "it fits with train.precision=split-host train.recompute=selective"),
        (1, "h200", ["model.num_hidden_layers=200"], "it fits on 8 h200 with train.precision=split train.recompute=budget"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(gpus: int, gpu: str, changes: list[str], remedy: str) -> None:
    error = refusal(planned(gpus, gpu, *changes))

    assert error is not None
    assert remedy in str(error)


def test_a_plan_that_does_not_fit_is_shown_all_the_same() -> None:
    result = CliRunner().invoke(app, ["plan", "keural-14b", "train.precision=fp32-bf16m", "--gpus", "2", "--gpu", "h100", "--json"])

    assert isinstance(result.exception, UserError)
    assert not json.loads(result.stdout)["fits"]


def test_a_frozen_copy_takes_its_place_and_its_time() -> None:
    cached, online = (
        planned(64, "h200", f"dpo.dpo.reference={where}", "dpo.train.epochs=2").stages[-1] for where in ("cached", "online")
    )

    assert online.laid.memory.parts["reference"] == cached.laid.memory.parts["weights"]
    assert online.laid.memory.total == pytest.approx(cached.laid.memory.total + cached.laid.memory.parts["weights"])
    assert (online.hours or 0) / (cached.hours or 1) == pytest.approx((1 + 1 / 4) / (1 + 1 / 8))


def test_a_length_that_nobody_knows_is_left_out() -> None:
    found = planned(1, "h200", "sft.data.sources=[{name: mine, adapter: text}]")

    assert found.data()["total"]["stages_left_out"] == ["sft"]
    assert "mine" in found.stages[2].length.source


def test_a_table_for_a_reader() -> None:
    result = CliRunner().invoke(app, ["plan", "keural-14b", "--gpus", "2"])

    assert result.exit_code == 0
    assert "run it: python -m keural.launch --nproc-per-node 2 run keural-14b" in result.stdout
    assert "published: 2 h200, 12,000 tokens/s" in result.stdout


def test_the_command_has_as_many_processes_as_there_are_gpus() -> None:
    assert "--nnodes 2 " in command(Path("toy"), 12, [])
    assert "--nproc-per-node 6 " in command(Path("toy"), 12, [])
    assert command(Path("my recipe"), 1, ["a=b"]) == "keural run 'my recipe' a=b"


def test_muon_has_one_running_mean_of_a_matrix() -> None:
    adamw, muon = (planned(64, "h200", *changes).largest.laid.memory for changes in (["train.precision=fp32"], MUON))

    matrices = 24 * (4096 * (2 * 4096 + 2 * 1024) + 8 * 3 * 4096 * 5632)
    assert adamw.parts["moments"] - muon.parts["moments"] == pytest.approx(4 * matrices / 64)
    assert adamw.parts["weights"] == muon.parts["weights"]


def test_two_cards_with_80_gb_have_room_for_halves() -> None:
    """Sharded, `split` takes two thirds of float32 weights with moments in bfloat16."""
    found = planned(2, "h100")

    assert found.fits
    assert {stage.laid.layout.precision for stage in found.stages} == {"split"}
    assert found.data()["reasons"]["precision"] == "fp32-bf16m would not fit"
    assert found.overrides[0] == "train.precision=split"


def test_copies_on_several_nodes_take_what_one_node_holds() -> None:
    whole, copies = planned(64, "h100"), planned(64, "h100", "train.shard_over=8")

    assert copies.data()["parameters_per_gpu"] == planned(8, "h100").data()["parameters_per_gpu"]
    assert copies.largest.laid.memory.total > whole.largest.laid.memory.total
    assert copies.data()["bytes_per_parameter"] == 12


def test_divided_experts_take_less_room_when_they_are_gathered() -> None:
    settings = ("train.micro_batch_tokens=4096", "train.recompute=full")
    whole, divided = planned(8, "h100", *settings), planned(8, "h100", *settings, "train.expert_parallel=8")

    assert divided.largest.laid.layout.way.compiled
    assert divided.data()["parameters_per_gpu"] == whole.data()["parameters_per_gpu"]
    taken, before = divided.largest.laid.memory.parts, whole.largest.laid.memory.parts
    assert taken["gathered"] < 0.6 * before["gathered"]
    with pytest.raises(UserError, match=r"expert_parallel 8 needs a multiple of 8 processes .* there are 12"):
        planned(12, "h100", "train.expert_parallel=8")


@pytest.mark.parametrize(("number", "more"), [(2, 0.4), (4, 0.6), (8, 1.0)])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_card_has_room_for_more_rows_than_even_routing_sends_it(recompute: str, number: int, more: float) -> None:
    settings = (f"train.recompute={recompute}", f"train.expert_parallel={number}", "train.precision=split")
    way, network = planned(8, "h100", *settings).largest.laid.layout.way, network_of(load_recipe(SHIPPED / "keural-14b"))
    even = replace(way, arriving=1.0)

    row = 0 if recompute == "full" else 2 * 5632 + 4096  # gate and up, and what came in
    found = kept(network, way, recompute) - kept(network, even, recompute)
    assert found == pytest.approx(more * 2 * 2 * row * way.tokens, rel=1e-4)
    assert layer_work(network, way, recompute) > layer_work(network, even, recompute)


@pytest.mark.parametrize("gpus", [1, 8])
def test_an_optimizer_with_one_precision_keeps_it(gpus: int) -> None:
    found = planned(gpus, "h200", "train.optimizer=muon")

    assert {stage.laid.layout.precision for stage in found.stages} == {"fp32"}


class TestAnswers:
    """A stage on labelled answers: a row each, and a forward pass on as many sequences again."""

    @pytest.fixture
    def recipe(self, tmp_path: Path) -> Path:
        shutil.copytree(SHIPPED / "keural-14b", tmp_path / "recipe")
        path = tmp_path / "recipe" / "dpo.yaml"
        changed = {"objective: dpo": "objective: kto", "dpo: {beta: 0.1, loss: sigmoid}": "kto: {beta: 0.1}"}
        changed |= {"batch_pairs: 64": "batch_answers: 64", "epochs: 1": "steps: 1000"}
        text = path.read_text()
        for old, new in changed.items():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        return path.parent

    def stage(self, recipe: Path, *changes: str) -> dict[str, Any]:
        plan = make_plan(load_recipe(recipe, changes), "h200", 1)
        return next(each.data(None) for each in plan.stages if each.laid.stage.name == "dpo")

    def test_its_rows_have_room_for_one_sequence(self, recipe: Path) -> None:
        found = self.stage(recipe)
        assert found["objective"] == "kto"
        assert found["tokens"] == 1000 * 64 * 2048

    def test_the_divergence_takes_a_forward_pass(self, recipe: Path) -> None:
        with_it, without = (self.stage(recipe, f"dpo.kto.loss={loss}")["hours"] for loss in ("kto", "apo_zero_unpaired"))
        assert 1.1 < with_it / without < 1.34


def test_a_stage_that_does_not_fit_is_the_one_that_is_told() -> None:
    """Though another one, which may take all of the card, takes more."""
    found = planned(
        1,
        "h200",
        "train.precision=split",
        "sft.train.recompute=budget",
        "sft.train.memory_gib=30",
        "sft.train.micro_batch_tokens=4096",
    )

    assert not found.fits
    assert found.data()["stage_of_the_peak"] == "sft"
    assert found.data()["available_gib"] == 30
    assert "sft takes" in str(refusal(found))
    assert "of which it may take 30.0" in str(refusal(found))


def test_a_stage_with_a_budget_is_planned_with_no_more_epochs_than_it_may_have() -> None:
    source = "dpo-2.data.sources=[{name: polite, adapter: preference, path: x, expect: 880}]"
    budget = "dpo-2.train.max_epochs=null"
    free = planned(1, "h100", budget, source, recipe="laptop").stages[-1].length
    bounded = planned(1, "h100", "dpo-2.train.max_epochs=2", source, recipe="laptop").stages[-1].length
    roomy = planned(1, "h100", "dpo-2.train.max_epochs=1e9", source, recipe="laptop").stages[-1].length
    unknown = planned(1, "h100", "dpo-2.train.max_epochs=2", recipe="laptop").stages[-1].length

    assert free.steps is not None
    assert (bounded.steps, free.steps > 110) == (110, True)  # 880 pairs, 16 in a step
    assert "as many steps as fit into the budget, but at most 2 epochs of 880 records (expect)" in bounded.source
    assert roomy.steps == unknown.steps == free.steps
    assert "at most 2 epochs of data that is not there" in unknown.source
