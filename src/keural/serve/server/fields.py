"""Fields of requests: what they may be, and what is said of one that may not.

In: JSON values. Out: typed requests, or one line that names the field. No field is ignored: each is honoured, or accepted because
it cannot change an answer (`Accepted`), or has to be absent or the value that says what is done anyway (`only`).
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from keural.errors import quoted
from keural.limits import LARGEST_ANSWER, LARGEST_PENALTY, LARGEST_SEED, LARGEST_TEMPERATURE, SMALLEST_PENALTY
from keural.serve.server.errors import ApiError

MOST_ANSWERS = 8
"""Of one request: prompts times `n`."""
MOST_LOGPROBS = 20
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_BIASES = 1024
LONGEST_REGEX, LONGEST_SCHEMA = 4096, 64 * 1024
MOST_CHOICES = 256


def _fail_fast(schema: Any) -> None:
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if part.get("type") == "list":
                part["fail_fast"] = True
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


class Fields(BaseModel):
    """A JSON object all of whose keys are known, with values of the types that are written here.

    Null is the same as leaving a field out, also of one that is not known: clients send back an answer with all fields that their
    types have, those of later versions too.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict) or None not in value.values():
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: part for name, part in value.items() if part is not None or name in known}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """As the library has it, but lists are looked at up to their first wrong item: a body may hold half a million of them."""
        schema = handler(source)
        _fail_fast(schema)
        return schema


Accepted = Annotated[Any, Field(default=None, description="Accepted: it cannot change an answer, and nothing is kept.")]


def only(*values: Any, why: str) -> Any:
    """A type with null and these values alone, which say what is done anyway; `why` another one cannot be honoured."""
    allowed = [None, *values]

    def check(value: Any) -> Any:
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed):
            use = f"leave it out{' or use ' + ' or '.join(_json(other) for other in values) if values else ''}"
            raise PydanticCustomError("unsupported_value", "{why}; {use}", {"why": why, "use": use})
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": allowed}), Field(default=None, description=why)]


def _json(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, f"{value!r}") if isinstance(value, bool) else f"{value!r}"


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _ids(value: dict[str, float]) -> dict[str, float]:
    if not all(re.fullmatch(r"0|[1-9][0-9]{0,8}", key) for key in value):  # one spelling: of two for an id one would be ignored
        raise PydanticCustomError("token_id", "its keys must be token ids, such as 5", {})
    return value


Stop = Annotated[
    Annotated[
        list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
        Field(max_length=MOST_STOPS),
        BeforeValidator(_stops, json_schema_input_type=str | list[str]),
    ]
    | None,
    Field(description="The answer ends before the first of these strings, which is not sent."),
]
LogitBias = Annotated[
    Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES), AfterValidator(_ids)] | None,
    Field(description="Added to the logits of these token ids."),
]
Count = Annotated[int, Field(ge=1, le=LARGEST_ANSWER)]
Temperature = Annotated[float, Field(ge=0, le=LARGEST_TEMPERATURE)]
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=SMALLEST_PENALTY, le=LARGEST_PENALTY)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
N = Annotated[int, Field(ge=1, le=MOST_ANSWERS)]


class StreamOptions(Fields):
    """How a stream is sent."""

    include_usage: bool | None = None
    include_obfuscation: Accepted


class Form(Fields):
    """What an answer must be: one of these."""

    json_schema: dict[str, Any] | None = Field(None, alias="json", description="JSON that this schema describes.")
    regex: Annotated[str, Field(min_length=1, max_length=LONGEST_REGEX)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MOST_CHOICES)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "Form":
        if sum(value is not None for value in (self.json_schema, self.regex, self.choice)) != 1:
            raise PydanticCustomError("one_of", "give one of `json`, `regex`, `choice`")
        return self


class Settings(Fields):
    """How tokens are chosen; what is left out is as the model was saved."""

    temperature: Temperature | None = Field(None, description="0 is greedy.")
    top_p: Probability | None = None
    repetition_penalty: Penalty | None = Field(None, description="Of the tokens of prompt and answer; 1 is none.")
    seed: Seed | None = Field(None, description="The same request with the same seed gives the same answer.")


class Generation(Settings):
    """What both older addresses of OpenAI's API have in common."""

    model: str | None = Field(None, description="The name that `/v1/models` gives; it may be left out.")
    max_tokens: Count | None = Field(None, description="Most tokens of an answer; the model's own setting where it is left out.")
    n: N | None = None
    stop: Stop = None
    logit_bias: LogitBias = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: Form | None = Field(None, description="The answer has this form.")
    user: Accepted
    frequency_penalty: only(0, why="there is no penalty by frequency, only `repetition_penalty`")  # type: ignore[valid-type]
    presence_penalty: only(0, why="there is no penalty by presence, only `repetition_penalty`")  # type: ignore[valid-type]


PREFIX = "="
"""What the names of a union's members begin with, so that they can be told from fields."""


def by_field(field: str, values: Sequence[str], otherwise: str) -> Discriminator:
    """Tells members of a union apart by a field: its values are their tags; what has another value or none has `otherwise`."""

    def tag(value: Any) -> str:
        found = value.get(field) if isinstance(value, dict) else None
        return f"{PREFIX}{found if found in values else otherwise}"

    return Discriminator(tag)


def text_or(name: str) -> Discriminator:
    """Tells a list, whose tag is `name`, from a text."""
    return Discriminator(lambda value: f"{PREFIX}{name if isinstance(value, list) else 'text'}")


def refusal(errors: Sequence[ErrorDetails]) -> ApiError:
    """The error that names the first field that is wrong."""
    error = errors[0]
    where = [part for part in error["loc"] if not (isinstance(part, str) and part.startswith(PREFIX))]
    if where[:1] == ["body"]:
        where = where[1:]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")[:200] or None
    kind, message = error["type"], error["msg"]
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field `{param}`", param, "unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"`{param}` is missing" if param else "a JSON object is expected", param, "missing_required_parameter")
    if kind == "unsupported_value":
        return ApiError(400, f"`{param}` is not supported: {message}", param, "unsupported_parameter")
    given = "" if isinstance(error["input"], dict | list) else f", not {quoted(error['input'])}"
    return ApiError(400, f"`{param or 'body'}`: {message[:1].lower()}{message[1:]}{given}", param, "invalid_value")
