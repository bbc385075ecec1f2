"""What adapters are made of: which parameters of the network they stand beside, by whose names, in which shapes.

In: targets of a recipe, or names in a file. Out: the names that PEFT has for them, and for each adapted parameter the shapes of its
two factors. PEFT puts an adapter of a matrix around its module, and one of a fused parameter around the module that holds it, once
for each such parameter, so the experts' second adapter lies one `base_layer` deeper.

Letters: r rank, E experts, H hidden size, I width of an expert.
"""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from keural.model import KeuralConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("gate_up_proj", "down_proj")
ROUTER = "gate"
MODULES = {"attention": ATTENTION, "experts": (), "router": ()}
"""PEFT's `target_modules` of each target of a recipe."""
PARAMETERS = {
    "attention": (),
    "experts": tuple(f"mlp.experts.{name}" for name in EXPERTS),
    "router": (f"mlp.{ROUTER}.weight",),
}
"""PEFT's `target_parameters` of each target."""


class Factors(NamedTuple):
    """An adapter of one parameter, which counts ``scaling * up @ down`` more: ``down`` ``[..., r, in]``, ``up`` ``[..., out, r]``,
    with a dimension E in front for fused experts.
    """

    down: Tensor
    up: Tensor
    scaling: float


class Shape(NamedTuple):
    """Of an adapted parameter: experts (None for one matrix), out, in."""

    experts: int | None
    out: int
    into: int

    def stored(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of `lora_A` and `lora_B` in PEFT's files."""
        width = rank * (self.experts or 1)
        return (width, self.into), (self.out, width)


def adapted_names(targets: Collection[str]) -> tuple[str, ...]:
    """The short names of the parameters that targets of a recipe stand for."""
    names = {"attention": ATTENTION, "experts": EXPERTS, "router": (ROUTER,)}
    return tuple(name for target, members in names.items() if target in targets for name in members)


def adapted_shapes(config: KeuralConfig, names: Collection[str]) -> dict[str, Shape]:
    """The parameters of a network that have an adapter, by their names in memory, with their shapes."""
    assert config.head_dim is not None  # filled in by the configuration
    hidden, width, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        "q_proj": Shape(None, queries, hidden),
        "k_proj": Shape(None, keys, hidden),
        "v_proj": Shape(None, keys, hidden),
        "o_proj": Shape(None, hidden, queries),
        ROUTER: Shape(None, experts, hidden),
        "gate_up_proj": Shape(experts, 2 * width, hidden),
        "down_proj": Shape(experts, hidden, width),
    }
    layers = range(config.num_hidden_layers)
    return {parameter_name(layer, name): shapes[name] for layer in layers for name in shapes if name in names}


def parameter_name(layer: int, name: str) -> str:
    """The name in memory of a layer's parameter with this short name."""
    if name in ATTENTION:
        return f"model.layers.{layer}.self_attn.{name}.weight"
    return f"model.layers.{layer}.mlp.gate.weight" if name == ROUTER else f"model.layers.{layer}.mlp.experts.{name}"


def stored_names(parameters: Collection[str], within: str = "gate_up_proj") -> dict[str, str]:
    """For each adapted parameter what comes before `.lora_A.weight` and `.lora_B.weight` in PEFT's files.

    Where both parameters of the experts have one, `within` is wrapped first and so lies one `base_layer` deeper; which one that
    is may differ between releases of PEFT.
    """
    found = {}
    for parameter in parameters:
        module, _, last = parameter.rpartition(".")
        both = last in EXPERTS and all(f"{module}.{name}" in parameters for name in EXPERTS)
        found[parameter] = f"base_model.model.{module}{'.base_layer' if both and last == within else ''}"
    return found


def factors_of(stored_a: Tensor, stored_b: Tensor, experts: int | None, scaling: float) -> Factors:
    """The factors as PEFT keeps them (`lora_A.weight` ``[E r, in]``, `lora_B.weight` ``[out, r E]``), experts apart.

    Row e * r + i of the first is row i of expert e; column i * E + e of the second is column i of expert e.
    """
    if experts is None:
        return Factors(stored_a, stored_b, scaling)
    down = stored_a.view(experts, -1, stored_a.shape[-1])
    up = stored_b.view(stored_b.shape[0], -1, experts).permute(2, 0, 1)
    return Factors(down, up, scaling)
