"""What a stage changed of its held-out conversations: of all, of each source, of each language.

In: the losses that a stage's directory holds from before its first step and from after its last one. Out: for each group the mean
loss per label before and after, their difference on the same conversations with its standard error and interval, and p, adjusted
by Holm for the number of groups.
"""

from pathlib import Path
from typing import Any

import numpy as np

from keural.evaluate.comparison.paired import ALPHA
from keural.evaluate.statistics import holm, paired_difference
from keural.evaluate.statistics.summary import finite
from keural.train.stage.item_losses import AFTER, BEFORE, ItemLosses


def heldout_change(directory: Path) -> dict[str, dict[str, Any]]:
    """The changes of the stage in `directory` by group (`ItemLosses.groups`); empty where it has no such losses, and where one of
    them is not finite.

    `better` is None where a difference is not significant. Raises `UserError` when a file is damaged.
    """
    before, after = (ItemLosses.find(directory / name) for name in (BEFORE, AFTER))
    if before is None or after is None or before.fingerprint != after.fingerprint:
        return {}
    labels = np.array(before.labels)
    first, second = np.array(before.losses), np.array(after.losses)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return {}
    groups = {name: kept for name, chosen in before.groups() if (kept := chosen & (labels > 0)).any()}
    changes = {name: paired_difference(first[which], second[which], weights=labels[which]) for name, which in groups.items()}
    found: dict[str, dict[str, Any]] = {}
    for (name, change), p in zip(changes.items(), holm([each.p for each in changes.values()]), strict=True):
        total = labels[groups[name]].sum()
        found[name] = {
            "items": change.n,
            "before": float(first[groups[name]].sum() / total),
            "after": float(second[groups[name]].sum() / total),
            "difference": change.value,
            "error": finite(change.error),
            "low": finite(change.low),
            "high": finite(change.high),
            "p_holm": p,
            "better": change.value < 0 if p <= ALPHA else None,
        }
    return found
