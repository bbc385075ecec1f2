"""What every field of the configuration is for: the table that checks of weights against settings, and the exports, go by.

In: two configurations. Out: where they describe different networks, or mean different things by the same ids. A field that
`KeuralConfig` gains must get a row here (a test says so), and then has one in every export format (`keural.convert.carried`).
"""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from .configuration_keural import SLIDING_ATTENTION, KeuralConfig

Changes = Literal["network", "ids", "training", "use"]
"""network: with the same weights another value gives other logits, or another longest context. ids: which ids begin, end and fill
texts. training: only what training adds to the loss, or random weights. use: only what a forward pass returns beside the logits.
"""

FIELDS: dict[str, Changes] = {
    "vocab_size": "network",
    "hidden_size": "network",
    "intermediate_size": "network",
    "num_hidden_layers": "network",
    "num_attention_heads": "network",
    "num_key_value_heads": "network",
    "head_dim": "network",
    "num_local_experts": "network",
    "num_experts_per_tok": "network",
    "hidden_act": "network",
    "rms_norm_eps": "network",
    "max_position_embeddings": "network",
    "sliding_window": "network",
    "layer_types": "network",
    "rope_parameters": "network",
    "tie_word_embeddings": "network",
    "pad_token_id": "ids",
    "bos_token_id": "ids",
    "eos_token_id": "ids",
    "initializer_range": "training",
    "router_aux_loss_coef": "training",
    "router_z_loss_coef": "training",
    "output_router_logits": "training",
    "use_cache": "use",
}
"""Fields that `KeuralConfig` declares. Those that it inherits say nothing of the network (`dtype`, labels, versions)."""
_SHOWN_LAYERS = 6


class Difference(NamedTuple):
    """A field in which two configurations disagree, the values as a message shows them."""

    name: str
    first: str
    second: str


def differences(first: KeuralConfig, second: KeuralConfig, besides: Collection[str] = ()) -> list[Difference]:
    """Fields that change the network and differ, in the order of the table; those in `besides` are not looked at."""
    return [
        Difference(name, shown(first, name), shown(second, name))
        for name, changes in FIELDS.items()
        if changes == "network" and name not in besides and getattr(first, name) != getattr(second, name)
    ]


def shown(config: KeuralConfig, name: str) -> str:
    """The value of a field in a few words."""
    value: Any = getattr(config, name)
    if isinstance(value, dict):
        return ", ".join(f"{key} {value[key]}" for key in sorted(value))
    if name != "layer_types":
        return str(value)
    sliding = [str(layer) for layer, kind in enumerate(value) if kind == SLIDING_ATTENTION]
    more = f" and {len(sliding) - _SHOWN_LAYERS} more" if len(sliding) > _SHOWN_LAYERS else ""
    return f"sliding on {', '.join(sliding[:_SHOWN_LAYERS])}{more}" if sliding else "full attention everywhere"


def foreign_ids(config: KeuralConfig, pad_id: int, bos_id: int, ends: Collection[int]) -> list[str]:
    """Which special ids of `config` are not those of a tokenizer: `pad_token_id 7 instead of 0`. None is no contradiction.

    Args:
        config: what is compared.
        pad_id: of the tokenizer.
        bos_id: of the tokenizer.
        ends: every id of the tokenizer that may end a text.
    """
    allowed = {"pad_token_id": {pad_id}, "bos_token_id": {bos_id}, "eos_token_id": set(ends)}
    found = []
    for name, known in allowed.items():
        value = getattr(config, name)
        stated = set(value) if isinstance(value, list) else {value} - {None}
        if not stated <= known:
            found.append(f"{name} {value} instead of {' or '.join(map(str, sorted(known)))}")
    return found
