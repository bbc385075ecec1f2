"""What schemathesis has to know beside a description: a key, and that a deadline that is over at once proves nothing.

In: `KEURAL_FUZZ_KEY`. Out: hooks, which schemathesis finds by `SCHEMATHESIS_HOOKS`.
"""

import os
from typing import Any

import schemathesis

SHORTEST = 600.0
"""Seconds; a client that asks for fewer gets the 504 that it asked for."""


@schemathesis.auth()
class Key:
    """Lets a request in; those without it are tried by schemathesis itself."""

    def get(self, case: Any, context: Any) -> str:
        return os.environ["KEURAL_FUZZ_KEY"]

    def set(self, case: Any, data: str, context: Any) -> None:
        case.headers["Authorization"] = f"Bearer {data}"


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    try:
        seconds = float(case.headers.get("X-Request-Timeout", SHORTEST))
    except ValueError:
        return
    if 0 < seconds < SHORTEST:
        case.headers["X-Request-Timeout"] = str(SHORTEST)
