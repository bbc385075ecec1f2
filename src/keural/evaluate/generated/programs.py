"""The program that is run for an answer: what was given, what was written, and the test.

In: an item's beginning of a program, its test and the name of what is tested; an answer. Out: a program.
"""

import re
from collections.abc import Mapping
from typing import Any

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def program_of(values: Mapping[str, Any], answer: str) -> str:
    """The program of an answer: it goes on with the beginning, or a block in fences that defines what is tested stands after it.

    Of several blocks the first counts, as in an answer that explains the program afterwards.
    """
    name = values["entry_point"]
    block = _FENCED.search(answer)
    written = block[1] if block else answer
    if block and re.search(rf"^[ \t]*def\s+{re.escape(name)}\b", written, re.MULTILINE):
        written = f"\n\n{written}"
    return f"{values['program']}{written}\n\n{values['test']}\n\ncheck({name})\n"
