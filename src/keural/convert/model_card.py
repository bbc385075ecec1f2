"""The README of an exported model directory: metadata that model hubs read, and what is known of the model, computed from its
files.

In: a `StoredModel` and the format it was written in. Out: Markdown. Nothing is claimed that the files do not say.
"""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from keural.model import count_parameters
from keural.pretrained.stored_model import StoredModel

_TEMPLATE = files("keural.convert").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
_TAGS = {"hf": ["keural", "mixture-of-experts", "custom_code"], "granite": ["keural", "mixture-of-experts", "granitemoe_swa"]}


def model_card(
    model: StoredModel, format_name: str, license_id: str | None, scores: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """The card of a model.

    Args:
        model: what is exported.
        format_name: to which format.
        license_id: as model hubs write it, None when the owner stated none.
        scores: what was measured of it by task, as `summary.json` has it of a stage; None when nothing was.
    """
    config = model.config
    total, active = count_parameters(config)
    metadata = {
        "language": ["ko", "en"],
        "license": license_id or "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": _TAGS[format_name],
    }
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(_TEMPLATE).render(
        metadata=yaml.safe_dump(metadata, allow_unicode=True, sort_keys=False).rstrip(),
        name=model.name,
        format=format_name,
        config=config,
        total=total,
        active=active,
        dtype=str(model.weights.infos["model.norm.weight"].dtype).removeprefix("torch."),
        sliding=[index for index, kind in enumerate(config.layer_types) if kind == "sliding_attention"],
        tokenizer=model.tokenizer,
        chat=model.chat,
        chain=model.lineage.get("chain", []),
        facts=_facts(model.lineage),
        scores=[_score(name, figures) for name, figures in (scores or {}).items() if figures.get("n")],
        license=license_id,
    )


def _score(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    """A line of the table: task, language, score, 95% interval, items, chance, items that training data held."""
    in_bits = figures.get("kind") == "rolling"
    low, high, chance = (figures.get(key) for key in ("low", "high", "chance"))
    interval = "" if low is None or high is None else f"{_figure(low, in_bits)} to {_figure(high, in_bits)}"
    seen = figures.get("contamination", {})
    held = "held out" if figures.get("heldout") else "not searched"
    if seen:
        held = f"{seen['found']:,}" + (" (not all of it searched)" if seen["unknown"] else "")
    packers = ", ".join(f"{name.replace('_', ' -')} {value:.3f}" for name, value in figures.get("baselines", {}).items() if in_bits)
    return (
        name.replace("|", "\\|"),
        str(figures.get("language") or ""),
        _figure(figures["score"], in_bits) + (" bits/byte" if in_bits else "") + (f" ({packers})" if packers else ""),
        interval,
        f"{figures['n']:,}",
        "" if chance is None else _figure(chance, in_bits),
        held,
    )


def _figure(value: float, in_bits: bool) -> str:
    return f"{value:.3f}" if in_bits else f"{value:.1%}"


def _facts(lineage: Mapping[str, Any]) -> dict[str, str]:
    """What `keural.json` says of where the model comes from, in one line each."""
    source = lineage.get("source") or {}
    named = {
        "recipe": lineage.get("recipe"),
        "stage": lineage.get("stage"),
        "fingerprint": lineage.get("fingerprint"),
        "imported from": source.get("file"),
        "training step": source.get("step"),
        "written by keural": lineage.get("keural"),
    }
    return {name: str(value) for name, value in named.items() if value is not None}
