"""How long a stage is, and what it takes of time and money.

In: a stage as it is laid out, and its rate. Out: steps, tokens, hours, each with where it comes from.
"""

import math
from dataclasses import dataclass, replace

from keural.plan.choice import Laid
from keural.plan.communication import Links, exposed
from keural.plan.gpus import Gpu
from keural.plan.speed import Rate
from keural.recipe import OBJECTIVES, Recipe, StageSpec, load_recipe, parse_duration
from keural.recipe.shipped import SHIPPED
from keural.train.memory.network import Network
from keural.train.memory.stage import row_tokens, rows_of_a_step, share_tokens

PUBLISHED = "keural-14b-published"
SAMPLE_TOKENS = 621
"""Tokens of a conversation: the mean that the published set of the first SFT stage states."""


@dataclass(frozen=True)
class Length:
    """Steps and tokens of a stage, padding included; None where nobody can know before the data is there."""

    steps: int | None
    tokens: int | None
    source: str


@dataclass(frozen=True)
class Cost:
    """What a stage takes on all GPUs together; None where its length is not known."""

    tokens_per_second: float
    """Of all GPUs."""
    seconds_per_step: float
    communication: float
    """Seconds of a step in which cards wait for each other; 0 where the rate is that of a whole step."""
    hours: float | None


def length(recipe: Recipe, stage: StageSpec, seconds_per_step: float) -> Length:
    """How long a stage is."""
    spec, per_step = stage.train, rows_of_a_step(stage) * row_tokens(stage)
    most = f"at most, as {OBJECTIVES[stage.objective].unit} share rows; " if spec.batch_records is not None else ""
    if spec.steps is not None:
        return Length(spec.steps, spec.steps * per_step, f"{most}train.steps x batch")
    if spec.budget_share is not None:
        assert recipe.spec.budget is not None
        steps = max(1, int(parse_duration(recipe.spec.budget) * spec.budget_share / seconds_per_step))
        by_budget = Length(steps, steps * per_step, f"{most}as many steps as fit into the budget")
        return by_budget if spec.max_epochs is None else _bounded(stage, by_budget, spec.max_epochs, per_step)
    assert spec.epochs is not None
    return _of_epochs(stage, spec.epochs, per_step, most)


def _of_epochs(stage: StageSpec, epochs: float, per_step: int, most: str) -> Length:
    """How long a stage of so many epochs is, by the counts that its sources state."""
    records, source = _records(stage)
    if records is None:
        return Length(None, None, f"{epochs:g} epochs of data that is not there; {source}")
    batch = stage.train.batch_records
    per_epoch = records * SAMPLE_TOKENS / per_step if batch is None else records / batch
    steps = math.ceil(per_epoch * epochs)
    text = f"{epochs:g} epochs of {records:,} records{f' of {SAMPLE_TOKENS} tokens' if batch is None else ''} ({source})"
    return Length(steps, steps * per_step, most + text)


def _bounded(stage: StageSpec, by_budget: Length, epochs: float, per_step: int) -> Length:
    """A stage with a budget and `train.max_epochs`: the shorter of both, by the budget where nobody knows how long an epoch is."""
    by_epochs = _of_epochs(stage, epochs, per_step, "")
    assert by_budget.steps is not None
    if by_epochs.steps is None:
        return replace(by_budget, source=f"{by_budget.source}, but at most {by_epochs.source}")
    shorter = by_epochs if by_epochs.steps < by_budget.steps else by_budget
    return replace(shorter, source=f"{by_budget.source}, but at most {by_epochs.source}")


def _records(stage: StageSpec) -> tuple[int | None, str]:
    """Records of a stage by the counts that its sources state, or that sources of the same name state as published; and whose."""
    if OBJECTIVES[stage.objective].store == "documents" or not stage.data.sources:
        return None, f"give {stage.name}.train.epochs=null {stage.name}.train.steps=NUMBER to count it"
    published = {
        source.name: source.expect
        for other in load_recipe(SHIPPED / PUBLISHED).stages
        for source in other.data.sources
        if source.expect is not None
    }
    total, whose = 0, "expect"
    for source in stage.data.sources:
        count = source.expect if source.expect is not None else published.get(source.name, source.limit)
        if count is None:
            return None, f"no source states the number of records of {source.name!r}: give it expect"
        whose = whose if source.expect is not None else "counts of the published sets of the same names"
        total += min(count, source.limit or count) * source.repeat
    return total, whose


def cost(network: Network, gpu: Gpu, laid: Laid, rate: Rate, links: Links) -> Cost:
    """How fast a stage is, and how long one step takes; rows are shared out evenly, and padding is computed, too."""
    stage, layout = laid.stage, laid.layout
    rows = rows_of_a_step(stage)
    tokens = share_tokens(stage, layout.gpus)
    flops = network.flops(stage.data.sequence_length)
    pass_seconds = tokens * flops / (gpu.flops(stage.train.compute_dtype) * rate.mfu)
    seconds = pass_seconds * (1 if rate.whole else 1 + ahead(network, laid)) + (0 if rate.whole else rate.optimizer_seconds)
    seconds += pass_seconds * compared(laid)
    waiting = 0.0 if rate.whole else communication(network, laid, links, pass_seconds)
    return Cost(rows * row_tokens(stage) / (seconds + waiting), seconds + waiting, waiting, None)


def communication(network: Network, laid: Laid, links: Links, pass_seconds: float) -> float:
    """Seconds of a step, whose forward and backward passes take `pass_seconds`, in which cards wait for what others send."""
    tokens, layers = share_tokens(laid.stage, laid.layout.gpus), network.model.num_hidden_layers
    micro_batches = math.ceil(tokens / laid.layout.way.tokens)
    of_a_layer = pass_seconds / micro_batches * (1 - _head(network, laid.stage)) / layers
    share = forward_share(laid)
    found = exposed(network, laid.layout, links, share * of_a_layer, (1 - share) * of_a_layer)
    forwards = 1 + (ahead(network, laid) > 0) + (compared(laid) > 0)
    return micro_batches * (forwards * found.forward + found.backward)


def _head(network: Network, stage: StageSpec) -> float:
    """The head's share of the work."""
    return 6 * network.embedding / network.flops(stage.data.sequence_length)


def ahead(network: Network, laid: Laid) -> float:
    """The share of a step's time that forward passes ahead take, which count the experts' load (`router.load: exact`)."""
    stage, way = laid.stage, laid.layout.way
    router, share = stage.router, share_tokens(stage, laid.layout.gpus)
    if router.load == "lagged" or router.scope == "micro_batch" or router.balance_coef == 0 or share <= way.tokens:
        return 0.0
    return forward_share(laid) * (1 - _head(network, stage))


def compared(laid: Laid) -> float:
    """Of a step's time, what the forward pass takes that measures the divergence of a step (kto) on as many sequences again."""
    stage = laid.stage
    return forward_share(laid) if OBJECTIVES[stage.objective].store == "answers" and stage.kto.needs_divergence else 0.0


def forward_share(laid: Laid) -> float:
    """Of a forward and backward pass: a third, or a quarter where the backward pass runs all layers again."""
    way = laid.layout.way
    again = way.mix.full / sum(way.mix) if way.mix is not None else float(way.recompute == "full")
    return 1 / (3 + again)


def hours(laid: Laid, found: Length, spent: Cost) -> float | None:
    """Of a stage with its reference pass, evaluations and checkpoints left out."""
    if found.steps is None:
        return None
    steps: float = found.steps
    if laid.stage.needs_reference:
        again = laid.stage.train.epochs or 1 if laid.stage.reference.reference == "cached" else 1
        kind = OBJECTIVES[laid.stage.objective]
        sequences = kind.sequences_per_record / kind.sequences_per_row  # of answers two, of which a step trains one
        steps += sequences * found.steps / max(1.0, again) * forward_share(laid)  # once for each record, or in every step
    return steps * spent.seconds_per_step / 3600
