"""A recipe's plan: `make_plan`.

In: a recipe, a card and how many, perhaps an MFU, a file of measurements, a price. Out: a `Plan`, as data and as the lines that a
command prints.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keural.errors import UserError
from keural.plan import published
from keural.plan.choice import Laid, available, check_modes, lay_out, overrides, remedy
from keural.plan.communication import cards_of_a_node, links_of
from keural.plan.gpus import Gpu, find_gpu
from keural.plan.speed import Rate, known_rate, measured_rate
from keural.plan.stages import Cost, Length, ahead, cost, hours, length
from keural.recipe import ModelSpec, Recipe
from keural.train.memory.network import Network, network_of
from keural.train.memory.parts import BYTES, GIB, MODES, SHARDED_MODES, stored
from keural.train.memory.stage import rows_of_a_step
from keural.train.processes.modes import largest_part


@dataclass(frozen=True)
class Speed:
    """What is known of a plan's speed beyond the tables of this package."""

    mfu: float | None = None
    """Of a whole step, as somebody states it."""
    measured: Path | None = None
    """A file of `benchmarks/gpu.py`."""
    network: float | None = None
    """Bytes per second of one card to other nodes, as somebody states it."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan."""

    laid: Laid
    rate: Rate
    length: Length
    cost: Cost
    hours: float | None

    def data(self, price: float | None) -> dict[str, Any]:
        """As plain data."""
        gpus, way = self.laid.layout.gpus, self.laid.layout.way
        gpu_hours = None if self.hours is None else self.hours * gpus
        return {
            "name": self.laid.stage.name,
            "objective": self.laid.stage.objective,
            "steps": self.length.steps,
            "tokens": self.length.tokens,
            "tokens_from": self.length.source,
            "precision": self.laid.layout.precision,
            "recompute": way.recompute,
            "layers": _layers(self.laid),
            "compile": way.compiled,
            "micro_batch_tokens": way.tokens,
            "computed_by": "engine" if way.engine else "layers",
            "memory_gib": self.laid.memory.gib()["total"],
            "fits": self.laid.fits,
            "mfu": round(self.rate.mfu, 4),
            "mfu_from": self.rate.source,
            "tokens_per_s": round(self.cost.tokens_per_second, 1),
            "seconds_per_step": round(self.cost.seconds_per_step, 4),
            "communication": round(self.cost.communication / self.cost.seconds_per_step, 4),
            "hours": _rounded(self.hours),
            "days": _rounded(None if self.hours is None else self.hours / 24),
            "gpu_hours": _rounded(gpu_hours),
            "cost": _rounded(None if gpu_hours is None or price is None else gpu_hours * price),
        }


@dataclass(frozen=True)
class Plan:
    """A recipe on GPUs."""

    recipe: Recipe
    network: Network
    gpu: Gpu
    gpus: int
    stages: tuple[StagePlan, ...]
    price: float | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(stage.laid.fits for stage in self.stages)

    @property
    def largest(self) -> StagePlan:
        """The stage that takes most of the memory that it may take: where one does not fit, such a one."""
        return max(
            self.stages, key=lambda stage: stage.laid.memory.total / available(stage.laid.stage, stage.laid.layout, self.gpu)
        )

    @property
    def overrides(self) -> list[str]:
        """Settings to give with the recipe: what was chosen where it is silent."""
        return overrides([stage.laid for stage in self.stages])

    def data(self) -> dict[str, Any]:
        """As plain data."""
        network, largest = self.network, self.largest.laid
        counts, row = network.counts, self.stages[0].laid.stage.data.sequence_length
        shards = largest.layout.shards
        state = {name: round(size / GIB, 2) for name, size in stored(network, largest.layout.precision, shards).items()}
        found = {
            "recipe": self.recipe.spec.name,
            "gpu": self.gpu.name,
            "gpus": self.gpus,
            "parameters": counts.total,
            "parameters_active": counts.active,
            "parameters_embedding": network.embedding,
            "parameters_per_gpu": network.held(shards),
            "flops_per_token": {
                "row": row,
                "6n_active": 6 * counts.active,
                "with_attention": round(network.flops(row)),
                "with_square_attention": round(network.flops(row, square=True)),
            },
            "precision": largest.layout.precision,
            "bytes_per_parameter": round(sum(BYTES[largest.layout.precision]), 2),
            "recompute": largest.layout.way.recompute,
            "layers": _layers(largest),
            "micro_batch_tokens": largest.layout.way.tokens,
            "compile": largest.layout.way.compiled,
            "reasons": reasons(self),
            "overrides": self.overrides,
            "stage_of_the_peak": largest.stage.name,
            "memory_gib": largest.memory.gib(),
            "peak_at": largest.memory.moment,
            "available_gib": available(largest.stage, largest.layout, self.gpu),
            "host_gib": {"per_process": round(largest.memory.host / GIB, 2), "state": state["host"]},
            "fits": self.fits,
            "stages": [stage.data(self.price) for stage in self.stages],
            "total": self._total(),
            "notes": list(self.notes),
        }
        if self.is_published_shape:
            found["published"] = published.beside() | {"gpu_hours_of_these_tokens": _rounded(self._at_published_rate())}
        return found

    @property
    def is_published_shape(self) -> bool:
        """Whether the network is the published one."""
        return self.recipe.spec.model == ModelSpec() and self.network.counts.total == 14_832_054_272

    def _at_published_rate(self) -> float:
        """GPU-hours of this plan's tokens by the published run."""
        tokens = sum(stage.length.tokens or 0 for stage in self.stages)
        return tokens / published.TOKENS_PER_SECOND * published.GPUS / 3600

    def _total(self) -> dict[str, Any]:
        known = [stage for stage in self.stages if stage.hours is not None]
        spent = sum(stage.hours or 0.0 for stage in known)
        return {
            "tokens": sum(stage.length.tokens or 0 for stage in known),
            "hours": _rounded(spent),
            "days": _rounded(spent / 24),
            "gpu_hours": _rounded(spent * self.gpus),
            "cost": None if self.price is None else _rounded(spent * self.gpus * self.price),
            "stages_left_out": [stage.laid.stage.name for stage in self.stages if stage.hours is None],
        }


def make_plan(recipe: Recipe, gpu_name: str, gpus: int, speed: Speed | None = None, price: float | None = None) -> Plan:
    """Plan a recipe on `gpus` cards called `gpu_name`; `price` is of one for an hour.

    A plan that does not fit is a plan, too; `refusal` says what would make it fit. Raises `UserError` for an unknown card, a stated
    mode that cannot run on so many, and measurements that say nothing of it.
    """
    gpu, speed, network = find_gpu(gpu_name), speed or Speed(), network_of(recipe)
    check_modes(recipe, gpus)
    laid = lay_out(recipe, gpu, gpus)
    stages = tuple(_stage(recipe, network, gpu, one, speed) for one in laid)
    notes = [*_notes(network, gpus, stages), *_links(gpu, gpus, stages, speed), *_faster(recipe, network, gpu, stages, speed)]
    return Plan(recipe, network, gpu, gpus, stages, price, tuple(notes))


def refusal(plan: Plan) -> UserError | None:
    """What is to be said of a plan that does not fit; None when it fits."""
    if plan.fits:
        return None
    largest = plan.largest.laid
    return UserError(
        f"{plan.recipe.spec.name}: {largest.stage.name} takes {largest.memory.gib()['total']:.1f} GiB of each of {plan.gpus} "
        f"{plan.gpu.name}, of which it may take {available(largest.stage, largest.layout, plan.gpu):.1f}; "
        f"{remedy(plan.recipe, plan.gpu, plan.gpus)}"
    )


def _stage(recipe: Recipe, network: Network, gpu: Gpu, laid: Laid, speed: Speed) -> StagePlan:
    way = laid.layout.way
    if speed.mfu is not None:
        rate = Rate(speed.mfu, 0.0, True, "stated")
    elif speed.measured is not None:
        rate = measured_rate(speed.measured, network, gpu, laid.layout.shards, way)
    else:
        rate = known_rate(network, gpu, laid.layout.shards, way, laid.layout.precision)
    spent = cost(network, gpu, laid, rate, links_of(gpu, speed.network))
    found = length(recipe, laid.stage, spent.seconds_per_step)
    return StagePlan(laid, rate, found, spent, hours(laid, found, spent))


def _notes(network: Network, gpus: int, stages: tuple[StagePlan, ...]) -> list[str]:
    """What a reader should know, one line each."""
    notes = []
    idle = {stage.laid.stage.name: rows_of_a_step(stage.laid.stage) for stage in stages}
    if few := {name: rows for name, rows in idle.items() if rows < gpus}:
        said = ", ".join(f"{name} {rows:,}" for name, rows in few.items())
        notes.append(f"a step has fewer rows than there are GPUs ({said}); the others compute padding: raise the batch")
    shards = stages[0].laid.layout.shards
    held, equal = network.held(shards), network.counts.total / shards
    if held > 1.1 * equal:
        experts = (network.model.num_local_experts, 2 * network.model.intermediate_size, network.model.hidden_size)
        good = [number for number in range(1, shards) if largest_part(experts, number) * number <= 1.1 * _size(experts)]
        notes.append(
            f"{shards} divide neither the experts nor their widths: one GPU holds {held / equal:.2f} times an equal part; "
            f"{good[-1] if good else 1} would be equal"
        )
    if slow := [stage.laid.stage.name for stage in stages if not stage.rate.whole and ahead(network, stage.laid) > 0]:
        share = max(ahead(network, stage.laid) for stage in stages)
        notes.append(
            f"{', '.join(slow)}: the load of the experts is counted in forward passes ahead, {100 * share:.0f}% more time; "
            "router.load=lagged goes without them (another loss, docs/training.md)"
        )
    return notes


def _links(gpu: Gpu, gpus: int, stages: tuple[StagePlan, ...], speed: Speed) -> list[str]:
    """What the time that cards wait for each other is, and what it was counted from."""
    shares = [stage.cost.communication / stage.cost.seconds_per_step for stage in stages if not stage.rate.whole]
    if gpus == 1 or not shares:
        return []
    links, each = links_of(gpu, speed.network), cards_of_a_node(gpus)
    between = "" if each == gpus else f" and {links.between / 1e9:.0f} between nodes of {each}"
    most = f"{100 * min(shares):.1f}% to {100 * max(shares):.1f}%"
    counted = f"{links.within / 1e9:.0f} GB/s of a card within a node{between}"
    return [f"waiting for other GPUs is {most} of a step, counted with {counted}; not measured"]


def _faster(recipe: Recipe, network: Network, gpu: Gpu, stages: tuple[StagePlan, ...], speed: Speed) -> list[str]:
    """A line with the settings that would take less time than those that the recipe states, if any do."""
    if speed != Speed() or not all(stage.laid.fits for stage in stages):
        return []
    other = lay_out(recipe, gpu, stages[0].laid.layout.gpus, free=True)
    if not all(laid.fits for laid in other) or (settings := overrides(other)) == overrides([stage.laid for stage in stages]):
        return []
    seconds = sum((stage.hours or 0.0) for stage in stages)
    less = sum((_stage(recipe, network, gpu, laid, speed).hours or 0.0) for laid in other)
    if not less < 0.97 * seconds:
        return []
    return [f"faster: {' '.join(settings)} takes {less / 24:,.1f} days instead of {seconds / 24:,.1f}"]


def reasons(plan: Plan) -> dict[str, str]:
    """Why the stage that takes most memory has its precision and its recomputation."""
    laid = plan.largest.laid
    modes = MODES if plan.gpus == 1 else SHARDED_MODES
    before = modes[: modes.index(laid.layout.precision)] if laid.layout.precision in modes else ()
    precision = f"{' and '.join(before)} would not fit" if before else "it fits"
    found = {"precision": precision, "recompute": "the fastest that fits"}
    return {key: why if key in laid.chosen else "stated in the recipe" for key, why in found.items()}


def _layers(laid: Laid) -> dict[str, int] | None:
    """How many layers keep what, where they differ (`train.recompute: budget`)."""
    mix = laid.layout.way.mix
    return None if mix is None else mix._asdict()


def _size(shape: tuple[int, ...]) -> int:
    return largest_part(shape, 1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
