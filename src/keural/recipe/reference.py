"""Every key of a recipe: type, default, bounds, meaning, and whether it changes a result; all of it read from the specs.

In: nothing, or a key. Out: `docs/recipes.md` (`python -m keural.recipe.reference` prints it), or the text of one key or section
(`keural recipe --explain KEY`).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
from pydantic.fields import FieldInfo

from keural.errors import UserError, nearest
from keural.recipe.base import Spec, mark_of
from keural.recipe.load import RecipeSpec
from keural.recipe.training import StageSpec
from keural.terminal import show_text

FILES: dict[str, type[Spec]] = {"recipe.yaml": RecipeSpec, "STAGE.yaml": StageSpec}
"""The files of a recipe, and what each holds."""
INTRODUCTION = """\
# The keys of a recipe

Made from `src/keural/recipe/` by `make docs`; a test compares the two. `keural recipe --explain KEY` shows the same of one key.

A recipe is a directory: `recipe.yaml`, and one file `STAGE.yaml` for each stage it names. A key inside a section is written with
dots, as on the command line: `train.lr=1e-5`; `[]` stands for each entry of a list. "Changes the result" says what happens to
finished work when a key gets another value: where it says yes, what the key belongs to is made again.
"""
PURPOSES = {
    "work": "how the work is done",
    "check": "only refuses or warns",
    "keeping": "what is saved and measured on the way",
    "report": "what is shown",
    "place": "where something lies; its content counts",
}
"""Why a key changes no result, for a reader; see `keural.recipe.base.Purpose`."""
PLAIN: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "anything"}
LIMITS: dict[type, str] = {
    bounds.Gt: "above {0.gt}",
    bounds.Ge: "at least {0.ge}",
    bounds.Lt: "below {0.lt}",
    bounds.Le: "at most {0.le}",
    bounds.MinLen: "length at least {0.min_length}",
    bounds.MaxLen: "length at most {0.max_length}",
}


@dataclass(frozen=True)
class Key:
    """One key of a section."""

    name: str
    """Without the sections around it."""
    meaning: str
    kind: str
    """Type and bounds in words."""
    default: str
    changes: str
    """Whether it changes a result, and for whom not."""
    inside: type[Spec] | None
    """What a section, or each entry of a list of sections, holds."""


@dataclass(frozen=True)
class Section:
    """The keys that stand together, and every place where they may stand."""

    spec: type[Spec]
    places: list[tuple[str, str]]
    """File and dotted prefix, empty for the file itself."""

    @property
    def keys(self) -> list[Key]:
        """In the order of the spec."""
        return [_key(name, field) for name, field in self.spec.model_fields.items()]


def sections() -> list[Section]:
    """All sections in the order in which a reader meets them."""
    found: dict[type[Spec], Section] = {}
    for file, spec in FILES.items():
        for kind, prefix in _walk(spec, ""):
            found.setdefault(kind, Section(kind, [])).places.append((file, prefix))
    return list(found.values())


def _walk(spec: type[Spec], prefix: str) -> Iterator[tuple[type[Spec], str]]:
    yield spec, prefix
    for name, field in spec.model_fields.items():
        inner = _inner(field.annotation)
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}{'[]' if _is_list(field.annotation) else ''}.")


def markdown() -> str:
    """The reference page."""
    return "\n".join([INTRODUCTION, *(_markdown(section) for section in sections())])


def _markdown(section: Section) -> str:
    rows = ["| key | meaning | type | default | changes the result |", "|---|---|---|---|---|"]
    for key in section.keys:
        cells = (f"`{key.name}`", key.meaning, key.kind, key.default, key.changes)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    file, prefix = section.places[0]
    title = f"`{prefix.rstrip('.')}` of `{file}`" if prefix else f"`{file}`"
    others = [f"`{prefix.rstrip('.')}` of `{file}`" for file, prefix in section.places[1:]]
    also = f" The same keys: {', '.join(others)}.\n" if others else "\n"
    return f"## {title}\n\n{_plain(section.spec.__doc__)}{also}\n" + "\n".join(rows) + "\n"


def explain(asked: str) -> str:
    """What there is to say of a key, or of every key of a section; a last part such as `lr` stands for each key that ends in it.

    Raises `UserError` with the nearest key where there is none.
    """
    wanted = re.sub(r"\[\]|\.\d+(?=\.|$)", "", asked)
    known = _by_name()
    matches = known.get(wanted) or [entry for name, entries in known.items() if name.endswith(f".{wanted}") for entry in entries]
    if not matches:
        raise UserError(f"no key {asked!r} in a recipe{nearest(wanted, known)}; docs/recipes.md lists all")
    return "\n\n".join(dict.fromkeys(matches)) + "\n"


def _by_name() -> dict[str, list[str]]:
    """The text of every key by its full name without `[]`; a name may stand in both files."""
    texts: dict[str, list[str]] = {}
    for section in sections():
        for file, prefix in section.places:
            for key in section.keys:
                texts.setdefault(f"{prefix}{key.name}".replace("[]", ""), []).append(_text(key, prefix, file))
    return texts


def _text(key: Key, prefix: str, file: str) -> str:
    """A key in plain words, and where it is a section the keys in it."""
    lines = [
        f"{prefix}{key.name} ({file})",
        f"  {key.meaning}",
        f"  type: {key.kind}; default: {key.default}; changes the result: {key.changes}",
    ]
    if key.inside is not None:
        lines += [f"  {inner.name}: {inner.meaning}" for inner in Section(key.inside, []).keys]
    return "\n".join(lines).replace("`", "")


def _key(name: str, field: FieldInfo) -> Key:
    limits = [LIMITS[type(limit)].format(limit) for limit in field.metadata if type(limit) in LIMITS]
    patterns = [f"matching `{limit.pattern}`" for limit in field.metadata if getattr(limit, "pattern", None)]
    return Key(
        name=name,
        meaning=_plain(field.description),
        kind=", ".join([_kind(field.annotation), *limits, *patterns]),
        default=_default(field),
        changes=_changes(field),
        inside=_inner(field.annotation),
    )


def _plain(text: str | None) -> str:
    return " ".join((text or "").split())


def _alternatives(annotation: Any) -> list[Any]:
    """The parts of `A | B`, without None."""
    if get_origin(annotation) in {Union, UnionType}:
        return [part for part in get_args(annotation) if part is not NoneType]
    return [annotation]


def _is_list(annotation: Any) -> bool:
    return any(get_origin(part) is list for part in _alternatives(annotation))


def _inner(annotation: Any) -> type[Spec] | None:
    """The spec that a section, or each entry of a list, is; None for a plain value."""
    for part in _alternatives(annotation):
        inner = get_args(part)[0] if get_origin(part) is list else part
        if isinstance(inner, type) and issubclass(inner, Spec):
            return inner
    return None


def _kind(annotation: Any) -> str:
    return " or ".join(_one_kind(part) for part in _alternatives(annotation))


def _one_kind(part: Any) -> str:
    if get_origin(part) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(part))
    if get_origin(part) is list:
        return f"list ({_kind(get_args(part)[0])})"
    if get_origin(part) is dict:
        return f"mapping ({_kind(get_args(part)[1])})"
    return PLAIN.get(part, "section")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, Spec):
        return "its defaults"
    return f"`{value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)}`"


def _changes(field: FieldInfo) -> str:
    mark = mark_of(field)
    if not mark["changes_result"]:
        return f"no: {PURPOSES[mark['purpose']]}" if "purpose" in mark else "no"
    if mark.get("length"):
        return "yes: the stage's length alone"
    return f"yes, but not of: {', '.join(mark['not_for'])}" if mark.get("not_for") else "yes"


if __name__ == "__main__":
    show_text(markdown())
