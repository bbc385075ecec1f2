"""What of a stage's figures is out of its range, and what that usually means.

In: the lines of a stage's metrics, one per optimizer step. Out: an `Alarm` where the mean of a figure over the last `WINDOW` steps
has left its range, each kind once in a stage. Nothing is stopped: a person decides.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from keural.recipe import OBJECTIVES, StageSpec

WINDOW = 20
"""Steps over which figures are averaged before anything is said of them."""


@dataclass(frozen=True)
class Alarm:
    """A figure out of its range."""

    name: str
    message: str
    """The figure, its range, and what it usually means."""


@dataclass(frozen=True)
class Range:
    """When a mean over the window is out of range, and what is said then."""

    key: str
    outside: Callable[[float], bool]
    said: str
    """With `{value}`."""
    objectives: tuple[str, ...] = ()
    """None named: all."""


RANGES: dict[str, Range] = {
    "accuracy_low": Range(
        "reward_accuracy",
        lambda value: value < 0.4,
        "only {value:.0%} of the pairs are ranked as their labels say (chance is 50%); usually labels are swapped in a source, or "
        "train.lr is too high",
        ("dpo",),
    ),
    "accuracy_perfect": Range(
        "reward_accuracy",
        lambda value: value > 0.99,
        "{value:.1%} of the pairs are ranked right; usually the sides can be told apart by form or length alone (see the length "
        "table of the report), or the same pairs were seen too often",
        ("dpo",),
    ),
    "margin_large": Range(
        "reward_margin",
        lambda value: value > 15,
        "the margin of rewards is {value:.1f}; the policy is far from its reference and usually overfits: fewer epochs, a lower "
        "train.lr or a larger beta",
        ("dpo", "kto"),
    ),
    "margin_reversed": Range(
        "reward_margin",
        lambda value: value < -0.5,
        "the margin of rewards between good and bad answers is {value:.2f}; usually labels are the other way round in a source, or "
        "train.lr is too high",
        ("kto",),
    ),
    "good_falls": Range(
        "good_ratio",
        lambda value: value < -0.25,
        "good answers grow less probable, too, {value:.2f} nats per token against the reference; usually bad ones weigh too much "
        "(kto.undesirable_weight), or train.lr is too high",
        ("kto",),
    ),
    "far_from_reference": Range(
        "reference_point",
        lambda value: value > 5,
        "answers to other prompts are rewarded {value:.1f}; the policy is far from its reference, and single answers hardly "
        "change the loss any more: fewer epochs, or a lower train.lr",
        ("kto",),
    ),
    "chosen_falls": Range(
        "chosen_ratio",
        lambda value: value < -0.25,
        "the chosen answers grow less probable too, {value:.2f} nats per token against the reference; usual where both sides are "
        "alike (probability moves to answers that nobody saw). dpo.loss rpo or dpop, or nll beside, keeps them up; so does a lower "
        "train.lr",
        ("dpo",),
    ),
    "collapse": Range(
        "balance_loss",
        lambda value: value > 2,
        "the router's balance loss is {value:.2f} (1 is even): a few experts get most tokens; usually router.balance_coef is too "
        "low for train.lr",
    ),
}
"""By the names that a run's records have."""


class Alarms:
    """Watches the figures of a stage; the same lines give the same alarms, so a resumed stage goes on where it was."""

    def __init__(self, stage: StageSpec) -> None:
        self._ranges = {name: each for name, each in RANGES.items() if not each.objectives or stage.objective in each.objectives}
        self._per_reward = stage.kto.beta if OBJECTIVES[stage.objective].store == "answers" else stage.dpo.beta
        self._per_token = stage.dpo.per_token
        self._values: dict[str, deque[float]] = {each.key: deque(maxlen=WINDOW) for each in self._ranges.values()}
        self._raised: set[str] = set()

    def look(self, line: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that this step's line raises."""
        if "loss" not in line:
            return []
        figures = dict(line) | self._derived(line)
        for key, values in self._values.items():
            if isinstance(figures.get(key), int | float):
                values.append(float(figures[key]))
        found = []
        for name, each in self._ranges.items():
            values = self._values[each.key]
            if name in self._raised or len(values) < WINDOW:
                continue
            mean = sum(values) / len(values)
            if each.outside(mean):
                self._raised.add(name)
                found.append(Alarm(name, each.said.format(value=mean)))
        return found

    def _derived(self, line: Mapping[str, Any]) -> dict[str, float]:
        """Log-ratios to the reference, per token, of chosen or good answers, and what the latter are compared with in rewards; of a
        stage without a reference none.
        """
        if "kl" in line:
            found = {"reference_point": float(line["kl"]) * self._per_reward}
            if "reward_desirable" in line:
                tokens = max(float(line["length_desirable"]), 1.0)
                found["good_ratio"] = float(line["reward_desirable"]) / self._per_reward / tokens
            return found
        if "kl_estimate" not in line:
            return {}
        tokens = 1.0 if self._per_token else max(float(line["length_chosen"]), 1.0)
        return {"chosen_ratio": float(line["reward_chosen"]) / self._per_reward / tokens}
