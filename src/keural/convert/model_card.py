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


def model_card(model: StoredModel, format_name: str, license_id: str | None) -> str:
    """The card of `model` as exported to `format_name`; `license_id` as model hubs write it, None when the owner stated none."""
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
        license=license_id,
    )


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
