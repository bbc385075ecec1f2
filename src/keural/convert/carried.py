"""What becomes of each field of the configuration in each export format: the one table that the exporters write from.

In: a configuration and the name of a format. Out: a refusal where the format cannot say what a field says, the values under the
names that the format has for them, and what is left behind that somebody who trains on would miss.

A field is carried as it is, translated where the other format means something else by its number, or must have the one value that
the format's readers take for granted. What changes no logits may have no place. A test walks over every field and every format.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from keural.errors import UserError
from keural.model import KeuralConfig
from keural.model.config_fields import FIELDS, foreign_ids, shown
from keural.tokenizer.model_file import BOS_ID, EOS_ID, PAD_ID

Check = Callable[[KeuralConfig], str | None]
"""What of a field a format cannot hold, as the message says it; None where it can."""


@dataclass(frozen=True)
class Rule:
    """What a format does with one field."""

    told: str
    """In the documentation."""
    keys: tuple[str, ...] = ()
    """What the field is called there; none where there is no place for it."""
    value: Callable[[KeuralConfig], Any] | None = None
    """The value there, where it is not the same."""
    problem: Check = lambda config: None
    lost: Check = lambda config: None
    """What is left behind and said, because training on would miss it."""


def _same(key: str | None = None, problem: Check = lambda config: None, told: str = "") -> Callable[[str], Rule]:
    """The field as it is, under its own name or another."""
    return lambda name: Rule(told or ("carried" if key is None else f"as `{key}`"), (key or name,), problem=problem)


def _translated(key: str, told: str, value: Callable[[KeuralConfig], Any], problem: Check = lambda config: None) -> Rule:
    return Rule(told, (key,), value, problem)


def _must_be(name: str, value: Any, reader: str) -> Rule:
    """A field that a format has no place for, because its readers know one value only."""
    return Rule(f"must be {value}", problem=lambda config: _other(config, name, value, reader))


def _other(config: KeuralConfig, name: str, value: Any, reader: str) -> str | None:
    return None if getattr(config, name) == value else f"{name} is {getattr(config, name)}, and {reader} {value} only"


def _plain_positions(config: KeuralConfig) -> str | None:
    kind = config.rope_parameters["rope_type"]
    return (
        None if kind == "default" else f"rope_parameters stretch positions (rope_type {kind!r}), and only unscaled ones can be said"
    )


def _slides(config: KeuralConfig) -> str | None:
    return None if config.sliding_window is not None else "sliding_window is None, and it needs one"


def _slides_on_even(config: KeuralConfig) -> str | None:
    default = KeuralConfig(num_hidden_layers=config.num_hidden_layers).layer_types
    if config.layer_types == default:
        return None
    return f"layer_types are {shown(config, 'layer_types')}, and the published code slides on even layers and only there"


def _theta(config: KeuralConfig) -> float:
    return float(config.rope_parameters["rope_theta"])


def _narrow_heads(config: KeuralConfig) -> str | None:
    assert config.head_dim is not None
    if config.head_dim * config.num_attention_heads == config.hidden_size:
        return None
    return (
        f"heads of width {config.head_dim} do not divide hidden_size {config.hidden_size} into {config.num_attention_heads}, and "
        "vLLM and SGLang derive the width from the two"
    )


def _whole_theta(config: KeuralConfig) -> str | None:
    if _plain_positions(config) or _theta(config).is_integer():
        return _plain_positions(config)
    return f"rope_theta is {_theta(config)}, and SGLang reads a whole number"


def _known_ids(config: KeuralConfig) -> str | None:
    """The special ids where a format takes them from the tokenizer, or from the size of the vocabulary."""
    foreign = foreign_ids(config, PAD_ID, BOS_ID, {EOS_ID, config.vocab_size - 1})
    return f"{', '.join(foreign)}, which every tokenizer of this package has" if foreign else None


def _z_loss(config: KeuralConfig) -> str | None:
    if config.router_z_loss_coef == 0:
        return None
    return f"router_z_loss_coef {config.router_z_loss_coef} has no field there: whoever trains on with it trains without the z-loss"


def _labels_loss(config: KeuralConfig) -> str | None:
    return "output_router_logits has no field there" if config.output_router_logits else None


_UNTRAINED = "no place: nothing is trained there"
_IDS = Rule("from the tokenizer", problem=_known_ids)
_READERS = {"granite": "vLLM and SGLang compute experts with", "gguf": "llama.cpp computes with", "pt": "the published code has"}

_SPECIAL: Mapping[str, Mapping[str, Rule | Callable[[str], Rule]]] = {
    "hf": {},
    "granite": {
        "head_dim": _same(problem=_narrow_heads, told="must be hidden_size / num_attention_heads"),
        "hidden_act": Rule(
            "must be silu", ("hidden_act",), problem=lambda config: _other(config, "hidden_act", "silu", _READERS["granite"])
        ),
        "sliding_window": _same(problem=_slides, told="carried; must be set"),
        "rope_parameters": _translated(
            "rope_parameters",
            "carried; unscaled, theta a whole number",
            lambda config: {"rope_type": "default", "rope_theta": _theta(config)},
            _whole_theta,
        ),
        "router_aux_loss_coef": _translated(
            "router_aux_loss_coef",
            "divided by num_experts_per_tok: the class's balance loss is so many times ours",
            lambda config: config.router_aux_loss_coef / config.num_experts_per_tok,
        ),
        "router_z_loss_coef": Rule("no place, which is said", lost=_z_loss),
    },
    "gguf": {
        "hidden_size": _same("embedding_length"),
        "intermediate_size": _same("feed_forward_length"),
        "num_hidden_layers": _same("block_count"),
        "num_attention_heads": _same("attention.head_count"),
        "num_key_value_heads": _same("attention.head_count_kv"),
        "head_dim": Rule(
            "as `attention.key_length`, `attention.value_length`, `rope.dimension_count`",
            ("attention.key_length", "attention.value_length", "rope.dimension_count"),
        ),
        "num_local_experts": _same("expert_count"),
        "num_experts_per_tok": _same("expert_used_count"),
        "hidden_act": _must_be("hidden_act", "silu", _READERS["gguf"]),
        "rms_norm_eps": _same("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": _same("context_length"),
        "sliding_window": _same("attention.sliding_window", _slides, "as `attention.sliding_window`; must be set"),
        "layer_types": _translated(
            "attention.sliding_window_pattern",
            "as `attention.sliding_window_pattern`",
            lambda config: [kind == "sliding_attention" for kind in config.layer_types],
        ),
        "rope_parameters": _translated("rope.freq_base", "theta as `rope.freq_base`; unscaled", _theta, _plain_positions),
        "tie_word_embeddings": _must_be("tie_word_embeddings", True, "the file is written for"),
        "pad_token_id": _IDS,
        "bos_token_id": _IDS,
        "eos_token_id": _IDS,
        "initializer_range": Rule(_UNTRAINED),
        "router_aux_loss_coef": Rule(_UNTRAINED),
        "router_z_loss_coef": Rule(_UNTRAINED),
        "output_router_logits": Rule(_UNTRAINED),
        "use_cache": Rule("no place: llama.cpp always has one"),
    },
    "pt": {
        "hidden_act": _must_be("hidden_act", "silu", _READERS["pt"]),
        "rms_norm_eps": _must_be("rms_norm_eps", 1e-5, _READERS["pt"]),
        "sliding_window": _translated(
            "sliding_window",
            "less one: keys before the token; must be set",
            lambda config: (config.sliding_window or 0) - 1,
            _slides,
        ),
        "layer_types": Rule("must slide on even layers", problem=_slides_on_even),
        "rope_parameters": _translated("rope_theta", "theta as `rope_theta`; unscaled", _theta, _plain_positions),
        "tie_word_embeddings": _must_be("tie_word_embeddings", True, _READERS["pt"]),
        "pad_token_id": _IDS,
        "bos_token_id": _IDS,
        "eos_token_id": _IDS,
        "initializer_range": Rule("no place: it starts no training anew"),
        "output_router_logits": Rule("no place, which is said", lost=_labels_loss),
        "use_cache": Rule("no place: the published code has no such switch"),
    },
}
"""What is not simply carried under its own name."""


def _rule(format_name: str, field: str) -> Rule:
    found = _SPECIAL[format_name].get(field, _same())
    return found if isinstance(found, Rule) else found(field)


RULES: dict[str, dict[str, Rule]] = {name: {field: _rule(name, field) for field in FIELDS} for name in _SPECIAL}
"""For each export format what it does with each field."""


def problems(config: KeuralConfig, format_name: str) -> list[str]:
    """What of a configuration the format cannot hold as it is; empty where it holds all of it."""
    found = (rule.problem(config) for rule in RULES[format_name].values())
    return list(dict.fromkeys(problem for problem in found if problem is not None))


def check_carried(config: KeuralConfig, format_name: str, where: str = "the model") -> None:
    """Raise `UserError`, naming every field that the format cannot hold as it is; `where` says which model."""
    if found := problems(config, format_name):
        raise UserError(f"{where} cannot be exported as {format_name}: {'; '.join(found)}; `--format hf` holds every model")


def carried(config: KeuralConfig, format_name: str) -> dict[str, Any]:
    """The values that a format has, by its own names. Raises `UserError` as `check_carried`."""
    check_carried(config, format_name)
    return {
        key: getattr(config, field) if rule.value is None else rule.value(config)
        for field, rule in RULES[format_name].items()
        for key in rule.keys
    }


def left_behind(config: KeuralConfig, format_name: str) -> list[str]:
    """One line for each setting that the export does not have and that training on would miss."""
    return [f"{format_name}: {lost}" for rule in RULES[format_name].values() if (lost := rule.lost(config)) is not None]


def carried_table() -> str:
    """The table as Markdown: a row for each field, a column for each format."""
    head = ["field", *(f"`{name}`" for name in RULES)]
    rows = [[f"`{field}`", *(rules[field].told for rules in RULES.values())] for field in FIELDS]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
