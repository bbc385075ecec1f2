"""`microworld`: rows of the package's own toy world, made by `keural.microworld`. It takes no path."""

from pathlib import Path
from typing import Any

from keural import microworld
from keural.data.adapters.base import Adapter, conversation, document, guarded, preference_pair, text_of
from keural.data.adapters.turns import message_of, messages_of
from keural.data.readers.options import COUNT, LIST, TEXT, Option, OptionTable
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


_OPTIONS: OptionTable = {
    "part": Option(TEXT, "what is made: documents, conversations or pairs; must be given", choices=tuple(PARTS)),
    "count": Option(COUNT, "how many rows are made; must be given"),
    "split": Option(TEXT, "of which content: what is trained on, or what evaluation asks for", "train", ("train", "heldout")),
    "phase": Option(COUNT, "stages with different numbers get different rows", 1),
    "tasks": Option(LIST, "what rows are about", tuple(microworld.TASKS), tuple(microworld.DRAWN)),
    "languages": Option(LIST, "languages of rows", choices=microworld.LANGUAGES),
    "forms": Option(LIST, "prose: how statements are written down", ("plain",), microworld.FORMS),
    "register": Option(TEXT, "instructions: how Korean answers address the user", "mirror", microworld.REGISTERS),
    "contrasts": Option(LIST, "pairs: what is wrong with the rejected answer", choices=microworld.CONTRASTS),
}
ADAPTERS = {
    "microworld": Adapter(
        _kind,
        guarded(_microworld),
        (),
        _OPTIONS,
        "Makes rows of the package's own toy world; takes no path.",
        gates=_SKIPPED,
        rows=microworld.rows,
        content=_content,
    ),
}
