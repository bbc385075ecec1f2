"""What fixes the shape of a network."""

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
