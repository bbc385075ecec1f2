"""Memory of one GPU by part, at the moment when most of it is taken.

In: a network and a layout. Out: bytes by part, the moment, and what lies in the host's memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from keural.train.memory.activations import Way, head_work, kept, layer_work, routing
from keural.train.memory.network import Network
from keural.train.processes.modes import SCALE_BLOCK, SPLIT

GIB = 2**30
MODES = ("fp32", "split", "split-host")
"""What one process may choose, the first that fits .."""
SHARDED_MODES = ("fp32-bf16m", "split")
""".. and several."""
SPLIT_STATE = 2 + 2 + 8 / SCALE_BLOCK
"""Bytes per parameter of `split`'s remainder, moments and scales where blocks have 256."""
BYTES = {
    "fp32": (4, 0, 4, 8, 0),
    "fp32-bf16m": (4, 0, 4, 4, 0),
    "split": (2, 2, 2, SPLIT_STATE - 2, 0),
    "split-host": (2, 0, 2, 0, SPLIT_STATE),
    "published": (2, 0, 2, 4, 0),
}
"""Bytes per parameter of weights, master, gradients and moments on a GPU, and of the state on the host."""
CONTEXT = 1.0
"""GiB that CUDA, its libraries and the allocator hold besides tensors: 1.0 to 2.5 were seen, the more the more was free."""
ERROR = 1.01
"""What GPUs took was at most so many times what was planned (tests); what fits by less does not fit."""
NCCL = 1.0
"""GiB that communication takes; stated, not measured."""
PARTS = ("weights", "master", "gradients", "moments", "reference", "gathered", "activations", "routing", "head", "layer", "slack")


@dataclass(frozen=True)
class Layout:
    """How a stage is laid out."""

    gpus: int
    precision: str
    way: Way
    reference: bool = False
    """A frozen copy of the model is there, too (`dpo.reference: online`)."""
    shard_over: int | None = None
    """GPUs that share a copy of the weights; None: all."""
    optimizer: str = "adamw"

    @property
    def shards(self) -> int:
        """Parts of a copy of the weights."""
        return min(self.shard_over or self.gpus, self.gpus)


@dataclass(frozen=True)
class Memory:
    """What one GPU holds when it holds most."""

    parts: dict[str, float]
    """Bytes by name of `PARTS`; what is not there at that moment is 0."""
    moment: str
    """`head`: at the height of the head. `layer`: in the last layer's backward pass. `later layer`: in another's, with the last
    one's gradients being summed. `reduction`: while these are made."""
    host: float
    """Bytes of the host's memory that one process takes at its start or for its state."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())

    def gib(self) -> dict[str, float]:
        """Parts and `total` in GiB."""
        return {name: round(size / GIB, 2) for name, size in (*self.parts.items(), ("total", self.total))}


def stored(network: Network, precision: str, shards: int, optimizer: str = "adamw") -> dict[str, float]:
    """Bytes of weights, master, gradients and moments on a GPU, and of the state on the host; `shards` share a copy."""
    held, wide = network.held(shards), network.held_wide(shards)
    names = ("weights", "master", "gradients", "moments", "host")
    found = {name: float(size * held) for name, size in zip(names, BYTES[precision], strict=True)}
    if optimizer == "muon":  # one running mean of a matrix in place of two
        found["moments"] -= 4 * network.held_of_matrices(shards)
    if precision in SPLIT:  # norms and routers are in float32, without a remainder
        found["weights"] += 2 * wide
        found["gradients"] += 2 * wide
        found["host" if precision == "split-host" else "master"] -= 2 * wide
        found["host" if precision == "split-host" else "moments"] += 8 * (network.held_scales(shards) - held / SCALE_BLOCK)
    return found


def memory(network: Network, layout: Layout) -> Memory:
    """What a stage takes of one GPU."""
    way = layout.way
    found = stored(network, layout.precision, layout.shards, layout.optimizer)
    made = 4.0 * (network.held(layout.shards) + (network.largest if layout.gpus > 1 else 0))  # each its part, a tensor at a time
    host = max(found.pop("host"), made)
    found["slack"] = (CONTEXT + (NCCL if layout.gpus > 1 else 0)) * GIB
    moments = _alone(network, way) if layout.gpus == 1 else _sharded(network, way, layout.shards)
    if layout.reference:
        found["reference"] = found["weights"]
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: float((found | moments[moment]).get(name, 0)) for name in PARTS}
    return Memory(parts, moment, host)


def _alone(network: Network, way: Way) -> dict[str, dict[str, float]]:
    """The moments of one process that may be its peak, with what each takes besides what is stored."""
    layers, routed = network.model.num_hidden_layers, routing(network, way)
    return {
        "head": {"activations": _kept_by(network, way, layers), "head": head_work(network, way) - routed, "routing": routed},
        "layer": _backward(network, way, range(layers)),
    }


def _kept_by(network: Network, way: Way, layers: int) -> float:
    """What the first so many layers keep."""
    return sum(kept(network, way, mode) for mode in way.modes(network.model.num_hidden_layers)[:layers])


def _backward(network: Network, way: Way, layers: Iterable[int]) -> dict[str, float]:
    """The backward pass of that one of some layers, counted from 0, which takes most, with what it and those below it keep."""
    modes = way.modes(network.model.num_hidden_layers)
    last = {modes[layer]: layer for layer in layers}  # of each mode: what is kept below it is most
    found = [
        {"activations": _kept_by(network, way, layer + 1), "layer": float(layer_work(network, way, mode))}
        for mode, layer in last.items()
    ]
    return max(found, key=lambda taken: sum(taken.values()))


def _sharded(network: Network, way: Way, shards: int) -> dict[str, dict[str, float]]:
    """The same of one among many, with the weights that are gathered and the gradients that are summed.

    A layer's gradients, in float32, are let go when the next layer's are sent.
    """
    layers, b, layer = network.model.num_hidden_layers, way.itemsize, network.gathered(way.expert_parallel)
    root = network.embedding * b
    ahead = 1 if layers > 2 else 0  # gathered before it is needed
    sent = layer * (ahead * b + b + 4) + 4 * network.layer / shards  # the next layer, gradients, what is sent, what comes back
    moments = _alone(network, way)
    moments["head"]["gathered"] = 2 * root  # and the same again for its gradient
    moments["layer"] = _backward(network, way, [layers - 1]) | {"gathered": root + min(layers, 2) * layer * b}
    if layers > 1:
        gathered = root + (1 + ahead) * layer * b + 4 * layer
        moments["later layer"] = _backward(network, way, range(layers - 1)) | {"gathered": gathered}
    moments["reduction"] = {"activations": _kept_by(network, way, layers - 1), "layer": root, "gathered": root + sent}
    return moments
