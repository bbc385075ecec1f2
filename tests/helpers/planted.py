"""Scorers with opinions of their own in place of a network, and tasks whose labels say nothing."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from keural.evaluate.tasks.items import Likelihood, LogProb
from keural.evaluate.tasks.loading import LoadedTask


class Planted:
    """Likes the choices of the items that it is asked, by their number and place, as it is told."""

    def __init__(self, likes: Callable[[int, int], float]) -> None:
        self.likes = likes

    def likelihoods(self, groups: Sequence[Sequence[Likelihood]]) -> Iterator[list[tuple[int, list[LogProb]]]]:
        for number, group in enumerate(groups):
            yield [(number, [LogProb(self.likes(number, place), False) for place in range(len(group))])]


def knowing(task: LoadedTask) -> Planted:
    """Knows the right choices."""
    return Planted(lambda number, place: 0.0 if task.items[number].right[place] else -50.0)


def opinionated(task: LoadedTask) -> Planted:
    """Likes a choice by its text, always the same, whatever the label."""
    return Planted(lambda number, place: -3 * random.Random(task.items[number].choices[place] + str(number)).random())


def shuffled(task: LoadedTask, seed: int = 0) -> LoadedTask:
    """The task with labels that say nothing: other choices of each item are right, either side of a pair is the better one."""
    draw = random.Random(seed)
    items = []
    for item in task.items:
        order = draw.sample(range(len(item.choices)), len(item.choices))
        if task.spec.kind == "pair":
            items.append(replace(item, choices=tuple(item.choices[place] for place in order)))
        else:
            items.append(replace(item, right=tuple(item.right[place] for place in order)))
    return replace(task, items=items)
