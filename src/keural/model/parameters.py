"""The number of weights of a network, in closed form.

In: its shape, from a configuration or a recipe. Out: two numbers. Nothing is built, and torch is not needed.
"""

from typing import NamedTuple, Protocol

CHATML_IDS = 2
"""Ids that every tokenizer of Keural has after its pieces, and that a base model may lack."""

SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
)
"""Fields of a configuration that every tensor's shape and the work per token follow from. They have the same names and meanings in
the published configuration, in GraniteMoeSWA's and in ours.
"""


class ParameterCount(NamedTuple):
    """Numbers of weights of a model."""

    total: int
    """Every weight once; a tied head is the embedding."""
    active: int
    """Weights that one token uses: all but those of the experts it is not routed to."""


class Shape(Protocol):
    """What a configuration and a recipe's `model` both say of a network."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def intermediate_size(self) -> int:
        """Width of one expert."""

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads."""

    @property
    def head_dim(self) -> int | None:
        """Width of one attention head."""

    @property
    def num_local_experts(self) -> int:
        """Experts of a block."""

    @property
    def num_experts_per_tok(self) -> int:
        """Experts that one token is routed to."""


class Configuration(Shape, Protocol):
    """A shape with its vocabulary, as `KeuralConfig` has them."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head is the embedding."""


def count_parameters(config: Configuration) -> ParameterCount:
    """Count the weights of the model that `config` describes, without building it."""
    return count_weights(config, config.vocab_size, tied=config.tie_word_embeddings)


def count_weights(shape: Shape, vocab_size: int, *, tied: bool = True) -> ParameterCount:
    """Count the weights of a network of this shape with `vocab_size` ids.

    Per layer, with hidden size H, expert width I, E experts, top-k k, head width D, Q query and K key-value heads: attention
    2·H·D·(Q + K), router E·H, experts 3·E·H·I, two norms 2·H. Once: embedding V·H, the head V·H again when it is not tied, final
    norm H. Active leaves out the (E - k) idle experts of each layer.
    """
    assert shape.head_dim is not None  # a configuration derives it when it is made
    hidden, experts = shape.hidden_size, shape.num_local_experts
    one_expert = 3 * hidden * shape.intermediate_size
    attention = 2 * hidden * shape.head_dim * (shape.num_attention_heads + shape.num_key_value_heads)
    layer = attention + experts * hidden + experts * one_expert + 2 * hidden
    embedding = vocab_size * hidden * (1 if tied else 2)
    total = shape.num_hidden_layers * layer + embedding + hidden
    idle = shape.num_hidden_layers * (experts - shape.num_experts_per_tok) * one_expert
    return ParameterCount(total=total, active=total - idle)
