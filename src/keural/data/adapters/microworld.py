"""`microworld`: rows of the package's own toy world, made by `keural.microworld`. It takes no path."""

from pathlib import Path
from typing import Any

from keural import microworld
from keural.data.adapters.base import Adapter, conversation, document, guarded, preference_pair, text_of
from keural.data.adapters.turns import message_of, messages_of
from keural.data.records import Drop, Kind, Record
from keural.recipe import GateAction, SourceSpec

PARTS: dict[str, Kind] = {"prose": "documents", "instructions": "conversations", "pairs": "pairs"}


def _kind(source: SourceSpec) -> Kind:
    return PARTS[source.options["part"]]


def _microworld(value: Any, source: SourceSpec, where: str) -> Record | Drop:
    language = value.get("language", source.language)
    if "text" in value:
        return document(value["text"], where, language)
    messages = messages_of(value["messages"])
    if "chosen" not in value:
        return conversation(messages, where, language)
    return preference_pair(messages, _answer(value, "chosen"), _answer(value, "rejected"), where, language)


def _answer(value: Any, side: str) -> str:
    return message_of(value[side]).content if isinstance(value[side], dict) else text_of(value, side)


# its rows are made to be learned from, and repeat prompts on purpose
_SKIPPED: dict[str, GateAction] = dict.fromkeys(("placeholders", "self_identification", "refusals", "language"), "skip")


def _content() -> list[Path]:
    return sorted(Path(str(microworld.__file__)).parent.glob("*.py"))


ADAPTERS = {
    "microworld": Adapter(_kind, guarded(_microworld), (), gates=_SKIPPED, rows=microworld.rows, content=_content),
}
