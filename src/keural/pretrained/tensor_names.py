"""Names of tensors: the published training code's, this package's on disk and in memory, and what wrappers put before them.

In: a name as some file has it. Out: the name that a model directory has (one matrix per expert, `model.` in front), and back to the
published one. The names differ in single components between dots, so two tables say everything.
"""

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Components that DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names."""
PUBLISHED_COMPONENTS = {
    "attn_norm": "input_layernorm",
    "moe_norm": "post_attention_layernorm",
    "attn": "self_attn",
    "moe": "mlp",
}
"""Components of the published training code and ours for the same thing."""
_PUBLISHED = {ours: published for published, ours in PUBLISHED_COMPONENTS.items()}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_BASE = "model"


def stored_name(name: str) -> str:
    """The name of a tensor in a model directory, whichever of the known layouts and wrappers `name` comes from.

    A name of no known layout comes back with `model.` in front, where nothing expects it, so that strict readers refuse it.
    """
    parts = [PUBLISHED_COMPONENTS.get(part, part) for part in name.split(".") if part not in WRAPPERS]
    if parts and parts[0] == _BASE:
        parts = parts[1:]
    plain = ".".join(parts)
    return plain if plain == HEAD else f"{_BASE}.{plain}"


def published_name(name: str) -> str:
    """The published training code's name of a tensor of a model directory."""
    return ".".join(_PUBLISHED.get(part, part) for part in name.removeprefix(f"{_BASE}.").split("."))


def is_published(name: str) -> bool:
    """Whether `name` has a component that only the published training code uses."""
    return any(part in PUBLISHED_COMPONENTS for part in name.split("."))
