"""What a plan says of the time in which several GPUs wait for each other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keural.cli.app import app
from keural.plan.communication import Exposed, Group, Links, exchanging, exposed, gathering, links_of, worst_group
from keural.plan.gpus import GPUS
from keural.plan.plan import Speed, StagePlan, make_plan
from keural.recipe import load_recipe
from keural.recipe.shipped import SHIPPED
from keural.train.memory.network import network_of
from tests.plan.test_plan import H100

LINKS = Links(360e9, 40e9)
NETWORK = network_of(load_recipe(SHIPPED / "keural-14b"))
EMBEDDING, EXPERTS = 131_074 * 4096, 8 * 3 * 4096 * 5632
LAYER = EXPERTS + 4096 * (2 * 4096 + 2 * 1024) + 8 * 4096 + 2 * 4096


def first_stage(gpus: int, *changes: str, gpu: str = "h200", speed: Speed | None = None) -> StagePlan:
    """Of the 14.83B model, with as many rows for every GPU whatever their number."""
    settings = ["train.precision=fp32-bf16m", "train.recompute=selective", "train.compile=true", "train.micro_batch_tokens=8192"]
    batch = f"pretrain-1.train.batch_tokens={16_384 * gpus}"
    recipe = load_recipe(SHIPPED / "keural-14b", [*settings, batch, "router.load=lagged", *changes])
    return make_plan(recipe, gpu, gpus, speed).stages[0]


def test_links_are_four_fifths_of_what_the_maker_states() -> None:
    assert links_of(GPUS["h100"]) == LINKS
    assert links_of(GPUS["a100"], 7e9) == Links(240e9, 7e9)


@pytest.mark.parametrize(
    ("gpus", "cards", "stride", "nodes", "local"),
    [
        (8, 8, 1, 1, 8),
        (64, 64, 1, 8, 8),
        (12, 12, 1, 2, 6),  # two nodes of six
        (13, 13, 1, 13, 1),  # a prime number of them goes on as many nodes
        (12, 4, 1, 2, 2),  # the second four lie on both nodes
        (64, 8, 8, 8, 1),  # copies: one card of each node
        (64, 16, 4, 8, 2),  # those that have the same quarter of the experts
        (32, 16, 2, 4, 4),
        (18, 9, 1, 2, 3),  # three nodes of six: six cards and three
    ],
)
def test_the_group_that_lies_worst_counts(gpus: int, cards: int, stride: int, nodes: int, local: int) -> None:
    assert worst_group(gpus, cards, stride) == Group(cards, nodes, local)


def test_every_card_receives_what_it_has_not() -> None:
    """3.6 GB on a node of eight, on two of them, and over the adapters of single cards."""
    latency = 8.4e-6
    assert gathering(3.6e9, Group(8, 1, 8), LINKS) == pytest.approx((latency + 7 * 3.4e-6, 7 / 8 * 10e-3, 0))
    assert gathering(3.6e9, Group(16, 2, 8), LINKS) == pytest.approx(
        (latency + 14 * 3.4e-6 + 14e-6, 15 / 16 * 10e-3, 1 / 2 * 3.6e9 / 320e9)
    )
    assert gathering(3.6e9, Group(8, 8, 1), LINKS) == pytest.approx((latency + 7 * 14e-6, 0, 7 / 8 * 3.6e9 / 40e9))
    assert gathering(3.6e9, Group(1, 1, 1), LINKS).seconds == 0


def test_tokens_go_to_the_others_of_a_group() -> None:
    assert exchanging(7.2e9, Group(8, 1, 8), LINKS).seconds == pytest.approx(8.4e-6 + 3.4e-6 + 7 / 8 * 20e-3)
    assert exchanging(7.2e9, Group(8, 2, 4), LINKS).seconds == pytest.approx(8.4e-6 + 14e-6 + 4 / 8 * 7.2e9 / 40e9)


def test_one_card_waits_for_nobody() -> None:
    stage = first_stage(1, "train.precision=split")

    assert exposed(NETWORK, stage.laid.layout, LINKS, 0.0, 0.0) == Exposed(0.0, 0.0)
    assert stage.cost.communication == 0
    assert not any("waiting" in note for note in make_plan(load_recipe(SHIPPED / "keural-14b"), "h200", 1).notes)


def test_what_products_do_not_hide_on_two_cards() -> None:
    """By hand: half of everything, weights in 2 bytes and gradients in 4, over NVLink."""
    layout, latency, half = first_stage(2).laid.layout, 8.4e-6 + 3.4e-6, 0.5 / 360e9
    gather, reduce = 2 * LAYER * half + latency, 4 * LAYER * half + latency
    root, root_sum = 2 * EMBEDDING * half + latency, 4 * EMBEDDING * half + latency

    slow = exposed(NETWORK, layout, LINKS, 1.0, 1.0)
    assert slow.forward == pytest.approx(root + gather)
    assert slow.backward == pytest.approx(gather + reduce + root_sum)
    fast = exposed(NETWORK, layout, LINKS, 1e-3, 2e-3)
    assert fast.forward == pytest.approx(root + gather + 23 * (gather - 1e-3))
    assert fast.backward == pytest.approx(gather + reduce + root_sum + 23 * (gather + reduce - 2e-3))


def test_copies_sum_their_parts_between_nodes() -> None:
    """By hand: eight nodes with a copy each; 2 x 7/8 of an eighth of the gradients go over every card's adapter."""
    layout = first_stage(64, "train.shard_over=8").laid.layout
    gather = Links(360e9, 1e20), 2 * LAYER * 7 / 8 / 360e9 + 8.4e-6 + 7 * 3.4e-6
    between = 2 * 7 / 8 * (4 * LAYER / 8) / 40e9
    latencies = 2 * (8.4e-6 + 7 * 3.4e-6) + 2 * (8.4e-6 + 7 * 14e-6)

    hidden, shown = (exposed(NETWORK, layout, LINKS, 1.0, seconds).backward for seconds in (1.0, 5e-3))
    assert shown - hidden == pytest.approx(23 * (latencies + between - 5e-3), rel=1e-6)
    assert exposed(NETWORK, layout, gather[0], 1.0, 1.0).forward == pytest.approx(
        gather[1] + 2 * EMBEDDING * 7 / 8 / 360e9 + 8.4e-6 + 7 * 3.4e-6
    )


@pytest.mark.parametrize(("recompute", "compiled", "ways"), [("selective", True, 4), ("selective", False, 6), ("full", True, 6)])
def test_rows_that_travel_to_experts_are_never_hidden(recompute: str, compiled: bool, ways: int) -> None:
    changes = ("train.expert_parallel=4", f"train.recompute={recompute}", f"train.compile={str(compiled).lower()}")
    layout = first_stage(8, *changes).laid.layout
    still = replace(layout, way=replace(layout.way, tokens=0))
    rows = 8192 * 2 * 1.6  # two experts of each token, and more than even routing sends

    found, least = (exposed(NETWORK, each, LINKS, 1.0, 1.0) for each in (layout, still))
    assert found.forward + found.backward - least.forward - least.backward == pytest.approx(
        ways * 24 * rows * 4096 * 2 * 3 / 4 / 360e9, rel=1e-4
    )


def test_divided_experts_are_gathered_among_those_that_have_the_same() -> None:
    layout = first_stage(8, "train.expert_parallel=8").laid.layout
    still, latency = replace(layout, way=replace(layout.way, tokens=0)), 8.4e-6 + 7 * 3.4e-6
    exchanges = 2 * 24 * (8.4e-6 + 3.4e-6)

    found = exposed(NETWORK, still, LINKS, 1.0, 1.0).forward - exchanges
    assert found == pytest.approx(2 * (LAYER - EXPERTS + EMBEDDING) * 7 / 8 / 360e9 + 2 * latency, rel=1e-6)


@pytest.mark.parametrize("changes", [(), ("train.shard_over=8",), ("train.expert_parallel=2",)], ids=["all", "copies", "experts"])
def test_more_cards_are_faster_together_and_none_is_faster_alone(changes: tuple[str, ...]) -> None:
    numbers = (2, 8, 16, 128, 1024)
    stages = [first_stage(number, *changes).cost for number in numbers]
    together, waiting = [stage.tokens_per_second for stage in stages], [stage.communication for stage in stages]

    assert together == sorted(together)
    assert waiting == sorted(waiting)
    assert together[-1] < 0.99 * 512 * together[0]


def test_a_card_that_has_a_copy_of_eight_steps_as_one_of_eight() -> None:
    copies, eight = first_stage(64, "train.shard_over=8"), first_stage(8)

    assert copies.rate.optimizer_seconds == eight.rate.optimizer_seconds > first_stage(64).rate.optimizer_seconds


def test_slower_networks_are_slower() -> None:
    speeds = [first_stage(64, speed=Speed(network=network)).cost.tokens_per_second for network in (1e9, 10e9, 40e9, 400e9)]

    assert speeds == sorted(speeds)
    assert speeds[0] < 0.2 * speeds[-1]


def test_a_rate_of_a_whole_step_has_it_and_one_that_was_measured_on_a_card_has_not(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(H100))
    stated, measured = (first_stage(64, gpu="h100", speed=speed) for speed in (Speed(mfu=0.4), Speed(measured=file)))

    assert stated.cost.communication == 0
    assert measured.rate.mfu == pytest.approx(0.4852)
    assert measured.cost.communication == pytest.approx(first_stage(64, gpu="h100").cost.communication, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--network", "0"], "--network 0.0: give the GB/s of one GPU to other nodes"),
        (["--network", "nan"], "--network nan"),
        (["--network", "40", "--mfu", "0.4"], "--mfu is of a whole step"),
    ],
)
def test_refusals(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["plan", "keural-14b", "--gpus", "64", *arguments])

    assert said in str(result.exception)


def test_a_plan_says_how_long_cards_wait_and_by_what_it_was_counted() -> None:
    result = CliRunner().invoke(app, ["plan", "keural-14b-64xh100", "--gpus", "64", "--gpu", "h100", "--network", "20"])

    assert result.exit_code == 0
    assert "counted with 360 GB/s of a card within a node and 20 between nodes of 8; not measured" in " ".join(
        result.stdout.split()
    )
