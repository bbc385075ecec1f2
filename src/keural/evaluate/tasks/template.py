"""Templates of tasks: text with the values of an item put in, and nothing that runs.

In: a template and the values of an item. Out: text. The notation is Jinja's, of which only this much is allowed: values by name and
place (`{{ choices[0] }}`), a few filters, words joined by `~`, and a choice between two (`{{ a if b else c }}`, `{% if %}`). There
are no loops, calls, attributes (nor as `["name"]`) or arithmetic, so that a task that somebody else wrote can at worst be wrong.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, UndefinedError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from keural.errors import quoted

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _lettered(choices: Sequence[str], pattern: str = "{}. {}", joint: str = "\n") -> str:
    """Choices below each other, a letter before each: `A. …`."""
    return joint.join(
        pattern.replace("{}", letter, 1).replace("{}", choice, 1) for letter, choice in zip(LETTERS, choices, strict=False)
    )


_FILTERS: dict[str, Any] = {
    "trim": lambda text: text.strip(),
    "lower": lambda text: text.lower(),
    "spaced": lambda text: text.replace("_", " "),
    "lettered": _lettered,
    "join": lambda texts, joint="": joint.join(texts),
}


class _ValuesAlone(ImmutableSandboxedEnvironment):
    """Knows the values of an item and nothing besides: no functions of Jinja's own, and no attributes in the notation of places."""

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True)
        self.globals, self.filters = {}, _FILTERS

    def getitem(self, obj: Any, argument: Any) -> Any:
        """What stands at a place; Jinja would go on to look for an attribute of that name."""
        try:
            return obj[argument]
        except (TypeError, LookupError):
            return self.undefined(obj=obj, name=argument)


_ENVIRONMENT = _ValuesAlone()
_ALLOWED = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Getitem, nodes.Filter, nodes.Keyword,
    nodes.Concat, nodes.CondExpr, nodes.If, nodes.Compare, nodes.Operand, nodes.Not, nodes.And, nodes.Or,
)  # fmt: skip


def check_template(text: str) -> None:
    """Raise ValueError for a template that is no such one, saying what of it is not allowed."""
    try:
        for node in _ENVIRONMENT.parse(text).find_all(nodes.Node):
            _check_part(text, node)
        _compiled(text)  # last: what is constant is computed here
    except TemplateError as error:
        raise ValueError(f"template {quoted(text)}: {error}") from error
    except (RecursionError, SyntaxError) as error:  # of Python, which a template is translated to
        raise ValueError(f"template {quoted(text)}: is nested too deeply") from error


def _check_part(text: str, node: nodes.Node) -> None:
    if not isinstance(node, _ALLOWED):
        raise ValueError(f"template {quoted(text)}: {type(node).__name__.lower()} is not allowed in templates of tasks")
    if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
        raise ValueError(f"template {quoted(text)}: no filter {node.name!r}; there are {', '.join(_FILTERS)}")


@functools.cache
def _compiled(text: str) -> Template:
    return _ENVIRONMENT.from_string(text)


def fill(text: str, values: Mapping[str, Any]) -> str:
    """The template with these values in it. Raises ValueError where it names one that is not there, or that is of another form."""
    if "{" not in text:
        return text
    try:
        return _compiled(text).render(values)
    except UndefinedError as error:
        raise ValueError(f"template {quoted(text)}: {error.message}; the item has {', '.join(values)}") from error
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise ValueError(f"template {quoted(text)}: {error}") from error
