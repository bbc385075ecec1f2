"""Bytes of memory that a forward and backward pass takes besides weights, gradients and the optimizer's state.

In: a network and how it is computed. Out: what a layer keeps, and the working memory of a layer and of the head. Terms are named by
the tensors that they are; they were compared with what runs (`tests/plan/test_memory_runs.py`, `benchmarks/gpu_*`).

Letters: N tokens of a micro-batch, H hidden size, I width of an expert, E experts, K of them per token, S = N K assignments, V
vocabulary, b bytes of a number that is computed with; 4 is float32.
"""

from dataclasses import dataclass
from typing import NamedTuple

from keural.train.memory.network import Network
from keural.train.processes.modes import padded, positions_of_a_piece


class Mix(NamedTuple):
    """How many layers, from the first to the last, keep what: those that keep least come first and go back last."""

    full: int = 0
    selective: int = 0
    none: int = 0

    @property
    def modes(self) -> tuple[str, ...]:
        """The mode of every layer."""
        return ("full",) * self.full + ("selective",) * self.selective + ("none",) * self.none

    def __str__(self) -> str:
        found = [f"{number} {name}" for name, number in self._asdict().items() if number]
        return ", ".join(found)


@dataclass(frozen=True)
class Way:
    """How a stage is computed on one GPU."""

    engine: bool
    """By the training engine, else by the model's own layers."""
    compiled: bool
    recompute: str
    """`none`, `selective`, `full`, or `budget` with a `mix`."""
    itemsize: int
    """Bytes of a number that is computed with."""
    converted: bool
    """Weights are stored in another dtype than they are used in, without sharding: each layer makes a copy of its own."""
    tokens: int
    """Of a micro-batch."""
    expert_parallel: int = 1
    """GPUs that have other experts each, see `train.expert_parallel`."""
    arriving: float = 1.0
    """Rows that such a GPU gets, over those that it would get if experts were used evenly."""
    mix: Mix | None = None
    """What each layer does under `budget`."""

    def mixed(self, assignments: int) -> int:
        """Rows that its experts multiply, where tokens of one GPU have so many assignments."""
        return round(assignments * self.arriving) if self.expert_parallel > 1 else assignments

    def modes(self, layers: int) -> tuple[str, ...]:
        """What each layer does: `none`, `selective` or `full`."""
        if self.mix is None:
            return (self.recompute,) * layers
        assert sum(self.mix) == layers, (self.mix, layers)
        return self.mix.modes


def kept(network: Network, way: Way, recompute: str) -> int:
    """What one layer keeps for its backward pass in a mode of recomputation."""
    m, tokens, b = network.model, way.tokens, way.itemsize
    hidden, assignments = tokens * m.hidden_size * b, tokens * m.num_experts_per_tok
    if recompute == "full":
        return hidden + 4 * tokens * m.num_local_experts  # the input, and the router's logits for its losses
    routed = 4 * tokens * m.num_local_experts + assignments * 29  # logits; weights, experts, order and places
    sums = 4 * tokens * m.num_attention_heads  # of the softmax
    queries, both = tokens * network.queries * b, 2 * tokens * network.keys * b
    inner = way.mixed(assignments) * m.intermediate_size * b
    outputs = way.mixed(assignments) * m.hidden_size * b
    came = outputs if way.expert_parallel > 1 else 0  # the rows that others sent
    copies = network.layer * b if way.converted and recompute == "none" else 0
    if not way.engine:
        norms = 2 * tokens * m.hidden_size * (4 + 2 * b)  # wide, normalised, times the gain
        return norms + 3 * queries + both + sums + 4 * inner + 2 * outputs + routed + copies
    products = hidden + queries + both + sums + queries + hidden + 2 * inner + routed  # input, q, k, v, attended, o, gate and up
    if recompute == "selective":
        return products + (came if way.compiled else outputs)  # uncompiled the second product is kept, and what came is sent again
    if way.compiled:
        return products + 5 * hidden + copies + came  # as measured on an H100 and an H200, where all experts were on one card
    wide = 2 * tokens * m.hidden_size * 4 * 2 + tokens * m.hidden_size * 4  # both norms, and the router's input
    return wide + 2 * hidden + queries + both + sums + queries + 2 * inner + routed + copies + came


def layer_work(network: Network, way: Way, recompute: str) -> int:
    """What a layer's backward pass takes at its height besides what was kept: what is computed again, and gradients."""
    m, tokens, b = network.model, way.tokens, way.itemsize
    hidden, assignments = tokens * m.hidden_size * b, tokens * m.num_experts_per_tok
    arrived = way.mixed(assignments)
    inner, outputs = arrived * m.intermediate_size * b, arrived * m.hidden_size * b
    again = kept(network, way, "none") - kept(network, way, recompute)
    waiting = network.embedding * b  # the head's gradient, until the embedding's is added
    experts = m.num_local_experts * m.intermediate_size * m.hidden_size * b
    copies = 2 * network.layer * b if way.converted else 0
    if not way.engine:
        gradients = max(2 * outputs + inner + experts, 3 * experts - outputs)  # at the down projection, or after the other one
        return again + waiting + hidden + gradients + copies
    travelling = outputs if way.expert_parallel > 1 else 0
    if way.compiled:
        return again + waiting + hidden + 2 * outputs + travelling + 4 * inner + 3 * experts + copies
    wide = (12 if b < 4 else 9) * arrived * m.intermediate_size * 4  # the gate's gradient, written out step by step
    return again + waiting + hidden + outputs + travelling + inner + wide + copies


def head_work(network: Network, way: Way) -> int:
    """What the head takes at its height, and the final norm's part that is kept until then."""
    m, tokens, b = network.model, way.tokens, way.itemsize
    hidden, norm = tokens * m.hidden_size * b, 2 * tokens * m.hidden_size * 4
    if not way.engine:
        copies = network.embedding * (2 * 4 + b)  # its gradient twice in float32, then as it is stored
        return copies + 3 * hidden + norm + routing(network, way)
    piece = positions_of_a_piece(network.vocabulary, b)
    rows = padded(network.vocabulary)
    return rows * m.hidden_size * (b + 4) + min(piece, tokens) * rows * b + 2 * hidden + norm + routing(network, way)


def routing(network: Network, way: Way) -> int:
    """What the router's losses are computed from: logits and probabilities of all layers, and which experts were chosen."""
    m = network.model
    return m.num_hidden_layers * way.tokens * (24 * m.num_local_experts + 9 * m.num_experts_per_tok)
