"""What several GPUs send each other in a step, and how much of it is not hidden behind products.

In: a network, a layout, the seconds of a micro-batch without it, links. Out: seconds that are added. Bandwidths and latencies are
stated, nothing here was measured:

- within a node NVLink in one direction, 450 GB/s of an H100 or H200, 300 of an A100 (NVIDIA's data sheets: 900, 600 both ways);
- between nodes one adapter a card, 50 GB/s (400 Gb/s InfiniBand, as in a DGX H100) and 25 (200 Gb/s, DGX A100);
- of both `ATTAINED`, about what nccl-tests reports of large messages;
- latencies of a ring's steps as NCCL's own cost model has them (`src/graph/tuning.cc`, protocol Simple).

Collectives are rings over all cards of a group: of n cards each receives (n - 1) / n of the whole over its links. Between m nodes
go (m - 1) / m of it, over the adapters of those cards of a node that are in the group. The group that lies worst counts. What is
sent at the same time shares links of a kind and not those of the other, so the slower kind counts. Everything that FSDP2 sends for
a layer is hidden behind the products of the layer before, as far as these take as long; the first layer's gathering, the last one's
summing, and embedding and head are not. Tokens that travel to experts never are.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from keural.plan.gpus import Gpu
from keural.train.memory.network import Network
from keural.train.memory.parts import Layout

NODE = 8
"""Most cards of a node."""
ATTAINED = 0.8
"""Share of a link's bandwidth that collectives reach: an assumption."""
BASE, WITHIN, BETWEEN = 8.4e-6, 3.4e-6, 14.0e-6
"""Seconds that a collective takes at least, and of a step of its ring within a node and between two."""


@dataclass(frozen=True)
class Links:
    """Bytes per second of one card in one direction, as attained: within its node, and to others."""

    within: float
    between: float


@dataclass(frozen=True)
class Group:
    """Cards that send to each other: how many, on how many nodes, and how many of them on the node with fewest."""

    cards: int
    nodes: int
    local: int


class Sent(NamedTuple):
    """Seconds that something takes on the way at least, and that it takes of the links within nodes and of those between them."""

    latency: float = 0.0
    within: float = 0.0
    between: float = 0.0

    @property
    def seconds(self) -> float:
        """Until it is there."""
        return self.latency + max(self.within, self.between)


def together(sent: Iterable[Sent]) -> Sent:
    """What is sent at the same time, one latency after another."""
    return Sent(*(sum(each) for each in zip(*sent, strict=True)))


@dataclass(frozen=True)
class Exposed:
    """Seconds that products do not hide: of a micro-batch's forward pass, and of its backward pass."""

    forward: float
    backward: float


def links_of(gpu: Gpu, between: float | None = None) -> Links:
    """The links of a card; `between`: bytes per second to other nodes, where somebody states it."""
    return Links(ATTAINED * gpu.nvlink, gpu.network * ATTAINED if between is None else between)


def cards_of_a_node(gpus: int) -> int:
    """On each of equal nodes: at most `NODE`, and as many as divide the number of all."""
    return max(number for number in range(1, NODE + 1) if gpus % number == 0)


@cache
def worst_group(gpus: int, cards: int, stride: int = 1) -> Group:
    """Of the groups of so many cards, each `stride` after the one before, the one with most nodes and fewest cards on one."""
    each = cards_of_a_node(gpus)
    found = []
    for first in range(0, gpus, cards * stride):
        for start in range(first, first + stride):
            on = Counter((start + index * stride) // each for index in range(cards))
            found.append(Group(cards, len(on), min(on.values())))
    return max(found, key=lambda group: (group.nodes, -group.local))


def gathering(whole: float, group: Group, links: Links) -> Sent:
    """Every card of a group gets all of `whole` bytes, of which each had a part; or the sum of its part (reduce-scatter)."""
    if group.cards == 1:
        return Sent()
    within = whole * (group.cards - 1) / group.cards / links.within if group.local > 1 else 0.0
    between = whole * (group.nodes - 1) / group.nodes / (group.local * links.between)
    return Sent(BASE + (group.cards - group.nodes) * WITHIN + (group.nodes - 1) * BETWEEN, within, between)


def exchanging(sent: float, group: Group, links: Links) -> Sent:
    """An all-to-all in which every card has `sent` bytes for all cards of its group."""
    if group.cards == 1:
        return Sent()
    within = sent * (group.local - 1) / group.cards / links.within
    between = sent * (group.cards - group.local) / group.cards / links.between if group.nodes > 1 else 0.0
    return Sent(BASE + (BETWEEN if group.nodes > 1 else WITHIN), within, between)


def exposed(network: Network, layout: Layout, links: Links, forward: float, backward: float) -> Exposed:
    """What communication adds to one micro-batch.

    Args:
        network: what is trained.
        layout: how it is laid out on the cards.
        links: between them.
        forward: seconds of the products of one layer's forward pass.
        backward: likewise of its backward pass.
    """
    if layout.gpus == 1:
        return Exposed(0.0, 0.0)
    layers, size = network.model.num_hidden_layers, layout.way.itemsize
    summed = 2 if layout.precision == "published" else 4
    gather = together(gathering(number * size, group, links) for number, group in _divided(network, layout))
    reduce = together(_summing(number * summed, group, layout, links) for number, group in _divided(network, layout))
    all_cards = worst_group(layout.gpus, layout.shards)
    root = gathering(network.embedding * size, all_cards, links)
    root_sum = _summing(network.embedding * summed, all_cards, layout, links)
    travel, again = _travelling(network, layout, links)
    left = (layers - 1) * max(0.0, gather.seconds - forward)
    ahead = root.seconds + gather.seconds + left + 2 * layers * travel
    left = (layers - 1) * max(0.0, together((gather, reduce)).seconds - backward)
    back = gather.seconds + left + reduce.seconds + root_sum.seconds + 2 * (layers + again) * travel
    return Exposed(ahead, back)


def _divided(network: Network, layout: Layout) -> list[tuple[float, Group]]:
    """What of a layer is divided among which cards: all of it, or experts by themselves."""
    number, whole = layout.way.expert_parallel, worst_group(layout.gpus, layout.shards)
    if number == 1:
        return [(network.layer, whole)]
    own = network.experts / number
    return [(network.layer - network.experts, whole), (own, worst_group(layout.gpus, layout.shards // number, number))]


def _summing(whole: float, group: Group, layout: Layout, links: Links) -> Sent:
    """Gradients are summed over those that share a copy of the weights, and each part over the copies (an all-reduce, which is as
    long as two gatherings).
    """
    copies = worst_group(layout.gpus, layout.gpus // layout.shards, layout.shards)
    over_copies = gathering(whole / group.cards, copies, links)
    return together((gathering(whole, group, links), over_copies, over_copies))


def _travelling(network: Network, layout: Layout, links: Links) -> tuple[float, int]:
    """Seconds in which the rows of a layer go to their experts, or come back; and in how many layers they do both once more in the
    backward pass, which computes these again.
    """
    way, m = layout.way, network.model
    if way.expert_parallel == 1:
        return 0.0, 0
    rows = way.mixed(way.tokens * m.num_experts_per_tok)
    group = worst_group(layout.gpus, way.expert_parallel)
    again = [mode == "full" or (mode == "selective" and not way.compiled) for mode in way.modes(m.num_hidden_layers)]
    return exchanging(rows * m.hidden_size * way.itemsize, group, links).seconds, sum(again)
