"""Memory of one GPU by part, at the moment when most of it is taken.

In: a network and a layout. Out: bytes by part, the moment, and what lies in the host's memory.
"""

from dataclasses import dataclass

from keural.plan.activations import Way, head_work, kept, layer_work, routing
from keural.plan.gpus import GIB
from keural.plan.network import Network

MODES = ("fp32", "split", "split-host")
"""What one process may choose, the first that fits .."""
SHARDED_MODES = ("fp32-bf16m",)
""".. and several."""
SPLIT_STATE = 2 + 2 + 8 / 256
"""Bytes per parameter of `split`'s remainder, moments and scales of blocks of 256."""
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
    one's gradients being summed. `reduction`: while these are made. `start`: where the frozen copy is made."""
    host: float
    """Bytes of the host's memory that one process takes at its start or for its state."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())

    def gib(self) -> dict[str, float]:
        """Parts and `total` in GiB."""
        return {name: round(size / GIB, 2) for name, size in (*self.parts.items(), ("total", self.total))}


def stored(network: Network, precision: str, shards: int) -> dict[str, float]:
    """Bytes of weights, master, gradients and moments on a GPU, and of the state on the host; `shards` share a copy."""
    held = network.held(shards)
    names = ("weights", "master", "gradients", "moments", "host")
    return {name: size * held for name, size in zip(names, BYTES[precision], strict=True)}


def memory(network: Network, layout: Layout) -> Memory:
    """What a stage takes of one GPU."""
    way = layout.way
    found = stored(network, layout.precision, layout.shards)
    made = 4.0 * (network.held(layout.shards) + (network.largest if layout.gpus > 1 else 0))  # each its part, a tensor at a time
    host = max(found.pop("host"), made)
    found["slack"] = (CONTEXT + (NCCL if layout.gpus > 1 else 0)) * GIB
    moments = _alone(network, way) if layout.gpus == 1 else _sharded(network, way, layout.shards)
    if layout.reference:
        found["reference"] = found["weights"]
        twice = found["weights"] + found["master"] + found["moments"]  # it is made as what is trained is, before gradients
        moments["start"] = {"reference": twice, "gradients": 0}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: float((found | moments[moment]).get(name, 0)) for name in PARTS}
    return Memory(parts, moment, host)


def _alone(network: Network, way: Way) -> dict[str, dict[str, float]]:
    """The moments of one process that may be its peak, with what each takes besides what is stored."""
    activations, routed = network.model.num_hidden_layers * kept(network, way), routing(network, way)
    return {
        "head": {"activations": activations, "head": head_work(network, way) - routed, "routing": routed},
        "layer": {"activations": activations, "layer": layer_work(network, way)},
    }


def _sharded(network: Network, way: Way, shards: int) -> dict[str, dict[str, float]]:
    """The same of one among many, with the weights that are gathered and the gradients that are summed.

    A layer's gradients, in float32, are let go when the next layer's are sent.
    """
    layers, b, layer = network.model.num_hidden_layers, way.itemsize, network.gathered(way.expert_parallel)
    root, work, one = network.embedding * b, layer_work(network, way), kept(network, way)
    ahead = 1 if layers > 2 else 0  # gathered before it is needed
    sent = layer * (ahead * b + b + 4) + 4 * network.layer / shards  # the next layer, gradients, what is sent, what comes back
    moments = _alone(network, way)
    moments["head"]["gathered"] = 2 * root  # and the same again for its gradient
    moments["layer"]["gathered"] = root + min(layers, 2) * layer * b
    if layers > 1:
        gathered = root + (1 + ahead) * layer * b + 4 * layer
        moments["later layer"] = {"activations": (layers - 1) * one, "layer": work, "gathered": gathered}
    moments["reduction"] = {"activations": (layers - 1) * one, "layer": root, "gathered": root + sent}
    return moments
