"""What each layer keeps so that a stage fits: `train.recompute: budget`.

In: a network, a layout, bytes. Out: the `Mix` with the least to compute again whose planned memory is no more than that.

Layers leave `full` for `selective` first, which saves nearly all that is computed again; those that then still have room go on to
`none`. Compiled ones do not: there `none` was measured to be slower than `selective` (`benchmarks/gpu_*`).
"""

from collections.abc import Callable
from dataclasses import replace

from keural.train.memory.activations import Mix
from keural.train.memory.network import Network
from keural.train.memory.parts import ERROR, Layout, memory


def with_mix(layout: Layout, mix: Mix) -> Layout:
    """A layout whose layers keep what a mix says."""
    return replace(layout, way=replace(layout.way, recompute="budget", mix=mix))


def best_mix(network: Network, layout: Layout, limit: float) -> Mix | None:
    """The mix with least to compute again that takes at most `limit` bytes; None where none does."""
    layers = network.model.num_hidden_layers

    def fits(mix: Mix) -> bool:
        return memory(network, with_mix(layout, mix)).total * ERROR <= limit

    full = _fewest(layers, lambda number: fits(Mix(full=number, selective=layers - number)))
    if full is None or full or layout.way.compiled:
        return None if full is None else Mix(full=full, selective=layers - full)
    selective = _fewest(layers, lambda number: fits(Mix(selective=number, none=layers - number)))
    assert selective is not None  # all of them fit
    return Mix(selective=selective, none=layers - selective)


def _fewest(most: int, fits: Callable[[int], bool]) -> int | None:
    """The smallest number of 0 to `most` that fits; None where none does.

    Up to `most - 2` each takes less than the one before. The last two layers are apart: with them in the mode that keeps less,
    what they compute again comes when everything else is still kept, which may be the height.
    """
    least, end = 0, max(most - 2, 0)
    if not fits(end):
        return next((number for number in range(end + 1, most + 1) if fits(number)), None)
    while least < end:
        middle = (least + end) // 2
        least, end = (least, middle) if fits(middle) else (middle + 1, end)
    return end
