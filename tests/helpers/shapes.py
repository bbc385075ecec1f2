"""Shapes of tiny models, each written once.

In: nothing. Out: keywords of `KeuralConfig` or of a recipe's `model`; what a test is about it adds itself.
"""

from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 5, "sliding_window": 9,
}  # fmt: skip
"""For the network itself: no two widths are equal, so that none can stand in for another, and the window is short."""

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_local_experts": 4,
}  # fmt: skip
"""For what is trained, converted and served; the vocabulary is the tokenizer's, the lengths are the test's."""

OF_A_RECIPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "num_local_experts": 4, "sliding_window": 9, "max_position_embeddings": 128,
}  # fmt: skip
"""The `model` of a recipe that runs in seconds."""
