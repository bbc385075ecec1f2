"""A network's tensors and its work per token, in closed form.

In: a recipe's `model` and the vocabulary. Out: shapes, numbers of parameters, FLOPs.

Letters: H hidden size, I width of an expert, E experts, K of them per token, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from keural.model.parameters import CHATML_IDS, ParameterCount, count_weights
from keural.recipe import ModelSpec, Recipe
from keural.train.processes.modes import largest_part, scale_block

if TYPE_CHECKING:
    from keural.model import KeuralConfig  # with torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """A shape with its vocabulary."""

    model: ModelSpec
    vocabulary: int

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.model.num_attention_heads * self.model.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together; of the value heads, too."""
        return self.model.num_key_value_heads * self.model.head_dim

    @property
    def counts(self) -> ParameterCount:
        """Parameters in all, and those that a token uses."""
        return count_weights(self.model, self.vocabulary)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, which is also the head."""
        return self.vocabulary * self.model.hidden_size

    @cached_property
    def layer_matrices(self) -> tuple[Shape, ...]:
        """The tensors of one layer that are not small: projections of attention and experts, as the network has them."""
        m = self.model
        attention = ((self.queries, m.hidden_size), (self.keys, m.hidden_size), (self.keys, m.hidden_size))
        experts = ((m.num_local_experts, 2 * m.intermediate_size, m.hidden_size),)
        down = ((m.num_local_experts, m.hidden_size, m.intermediate_size),)
        return (*attention, *experts, *down, (m.hidden_size, self.queries))

    @cached_property
    def layer_shapes(self) -> tuple[Shape, ...]:
        """All tensors of one layer: the matrices, the router and two norms."""
        m = self.model
        return (*self.layer_matrices, (m.num_local_experts, m.hidden_size), (m.hidden_size,), (m.hidden_size,))

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return sum(map(prod, self.layer_shapes))

    @property
    def experts(self) -> int:
        """Those of them that are experts'."""
        return sum(prod(shape) for shape in self.layer_shapes if len(shape) == 3)

    def gathered(self, expert_parallel: int) -> int:
        """Parameters of a layer that a process has when it computes it: all, but only its part of the experts."""
        return self.layer - self.experts + self.experts // expert_parallel

    @property
    def largest(self) -> int:
        """Parameters of the largest tensor."""
        return max(self.embedding, *(prod(shape) for shape in self.layer_shapes))

    def held(self, processes: int) -> int:
        """Parameters that the process with most of them holds when all tensors are divided over `processes`."""
        others: Sequence[Shape] = ((self.vocabulary, self.model.hidden_size), (self.model.hidden_size,))
        layer = sum(largest_part(shape, processes) for shape in self.layer_shapes)
        return self.model.num_hidden_layers * layer + sum(largest_part(shape, processes) for shape in others)

    def held_of_matrices(self, processes: int) -> int:
        """Those of them that are in matrices of the layers."""
        return self.model.num_hidden_layers * sum(largest_part(shape, processes) for shape in self.layer_matrices)

    def held_wide(self, processes: int) -> int:
        """Those of them that are in norms and routers, which `split` keeps in float32."""
        embedding = largest_part((self.vocabulary, self.model.hidden_size), processes)
        return self.held(processes) - self.held_of_matrices(processes) - embedding

    def held_scales(self, processes: int) -> int:
        """Scales of each moment that `split` has for them."""
        embedding: Shape = (self.vocabulary, self.model.hidden_size)
        in_layers = sum(largest_part(shape, processes) // scale_block(shape) for shape in self.layer_matrices)
        found = self.model.num_hidden_layers * in_layers + largest_part(embedding, processes) // scale_block(embedding)
        return found + self.held_wide(processes)

    def flops(self, length: int, document: int | None = None, square: bool = False) -> float:
        """FLOPs of a token's forward and backward pass, recomputation left out.

        Args:
            length: of a row.
            document: tokens of a document, which sees only itself; None is one document per row.
            square: count all `length` keys in every layer, as if nothing were masked.

        Returns:
            3 times the forward pass: experts, projections and head, and attention over the keys that a token sees on the mean.
        """
        m, seen = self.model, min(document or length, length)
        per_layer = 6 * m.hidden_size * m.intermediate_size * m.num_experts_per_tok
        per_layer += 4 * m.hidden_size * (self.queries + self.keys)
        total = 2.0 * self.embedding
        for layer in range(m.num_hidden_layers):
            window = min(m.sliding_window, seen) if layer % 2 == 0 else seen
            keys = length if square else (window * (window + 1) / 2 + (seen - window) * window) / seen
            total += per_layer + 4 * self.queries * keys
        return 3 * total


def network_of(recipe: Recipe) -> Network:
    """The network of a recipe, with the two ids of ChatML."""
    return Network(recipe.spec.model, recipe.spec.tokenizer.vocab_size + CHATML_IDS)


def network_of_config(config: "KeuralConfig") -> Network:
    """The network of a model's configuration, which has more than sizes."""
    sizes = {name: value for name, value in config.to_dict().items() if name in ModelSpec.model_fields}
    return Network(ModelSpec.model_validate(sizes), config.vocab_size)
