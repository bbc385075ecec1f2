"""Definitions of tools, and which of them an answer may or must call.

In: tools and `tool_choice`, in an API's own shape. Out: definitions as the chat template renders them, and the form of the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag, ValidatorFunctionWrapHandler, model_validator
from pydantic_core import PydanticCustomError

from keural.serve.calls import CallForm, Mode, Places
from keural.serve.constrain import Form
from keural.serve.server.errors import ApiError, to_json
from keural.serve.server.fields import LONGEST_SCHEMA, PREFIX, Accepted, Fields, only
from keural.serve.server.service import Service

MOST_TOOLS = 128
NOT_TRAINED = (
    "this model's record does not say that it was trained on calls of tools, so it cannot decide by itself whether to call one: "
    "require a call, name a tool, or choose none"
)
ONE_CALLER = "tools are called by the client alone"

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="Letters, digits, `_` and `-`; at most 64.")]
Schema = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A function that a client offers."""

    name: str
    definition: Mapping[str, Any]
    """As the model reads it: `name`, `description`, `parameters`."""
    schema: Mapping[str, Any] | None
    """Of its arguments, an object's; None where it takes none."""


@dataclass(frozen=True)
class ToolUse:
    """What an answer may or must call."""

    tools: Sequence[Tool] = ()
    mode: Mode = "none"
    allowed: frozenset[str] = frozenset()
    """Names of tools that it may call."""
    parallel: bool = True
    said: Mapping[str, Any] | None = None
    """The schema of an answer that may call and does not."""

    @property
    def definitions(self) -> list[Mapping[str, Any]]:
        """Of all tools, for the prompt."""
        return [tool.definition for tool in self.tools]

    @property
    def places(self) -> Places:
        """Where there can be calls in the answer."""
        return "" if self.mode == "none" else "anywhere" if self.said is None else "first"


@dataclass(frozen=True)
class Choice:
    """What a request says of tools, in no API's shape."""

    mode: Mode | None = None
    """None: as usual, `auto` where there are tools."""
    names: Sequence[str] | None = None
    """Of tools that alone may be called; None: any."""
    parallel: bool = True


def tool_use(service: Service, tools: Sequence[Tool], choice: Choice) -> ToolUse:
    """What an answer may call. Raises `ApiError` for tools that cannot be told apart, and for a choice that cannot be honoured."""
    if not tools:
        if choice.mode == "required" or choice.names is not None:
            raise ApiError(400, "`tool_choice`: there are no `tools` to choose from", "tool_choice", "invalid_value")
        return ToolUse()
    if len(tools) > MOST_TOOLS:
        raise ApiError(400, f"`tools`: at most {MOST_TOOLS} tools, not {len(tools)}", "tools", "invalid_value")
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ApiError(400, f"`tools`: two are called `{twice}`", "tools", "invalid_value")
    if sum(len(to_json(tool.schema or {})) for tool in tools) > LONGEST_SCHEMA:
        raise ApiError(400, f"`tools`: the schemas of all may have {LONGEST_SCHEMA:,} bytes together", "tools", "invalid_value")
    for place, tool in enumerate(tools):
        _check_object(tool.schema, f"tools[{place}]")
    allowed = names if choice.names is None else choice.names
    if unknown := next((name for name in allowed if name not in names), None):
        raise ApiError(400, f"`tool_choice`: there is no tool `{unknown}` among `tools`", "tool_choice", "invalid_value")
    mode = choice.mode or "auto"
    if mode == "auto" and not service.trained_on_tools:
        raise ApiError(400, f"`tool_choice`: {NOT_TRAINED}", "tool_choice", "tools_not_trained")
    return ToolUse(tools, mode, frozenset(allowed), choice.parallel)


def _check_object(schema: Mapping[str, Any] | None, param: str) -> None:
    """Raise `ApiError` unless a schema can be an object's."""
    if schema is not None and schema.get("type", "object") != "object":
        raise ApiError(400, f"`{param}`: arguments are an object: give their schema the type `object`", param, "invalid_value")


NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}


async def form_of_calls(service: Service, use: ToolUse) -> Form | None:
    """The form that holds an answer to its tools; None where there are none. Raises `ApiError` for what cannot be followed."""
    if not use.tools:
        return None
    schemas = {tool.name: NO_ARGUMENTS if tool.schema is None else tool.schema for tool in use.tools if tool.name in use.allowed}
    calls = CallForm(use.mode, schemas, use.parallel, use.said)
    try:
        form = await service.read(service.grammars.lark, calls.grammar(), "a schema of `tools`", param="tools")
        form.asked = {"grammar": calls.grammar(), "structural_tag": calls.structural_tag()}
        return form
    except ApiError:
        for place, tool in enumerate(use.tools):  # which one is it?
            if tool.name in schemas:
                alone = CallForm("required", {tool.name: schemas[tool.name]}, parallel=False).grammar()
                await service.read(service.grammars.lark, alone, f"the schema of `tools[{place}]`", param=f"tools[{place}]")
        raise


async def form_beside_calls(service: Service, use: ToolUse, form: Form | None) -> tuple[Form | None, ToolUse]:
    """The form of an answer that has perhaps one already, which is that of what it says. Raises `ApiError` where both cannot hold.

    An answer that must call says nothing. One that may do either is JSON of its schema or calls: JSON never begins like a call.
    """
    if form is None or use.mode == "required":
        return await form_of_calls(service, use), use
    if use.mode == "none":
        return form, use
    if "json" not in form.asked:
        what = "an answer of a regular expression or of choices cannot also be free to call tools; use required or none"
        raise ApiError(400, f"`tool_choice`: {what}", "tool_choice", "invalid_value")
    use = replace(use, said=form.asked["json"])
    return await form_of_calls(service, use), use


class FunctionDefinition(Fields):
    """A function with the schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: Schema | None = Field(None, description="A JSON schema of an object; calls follow it, `strict` or not.")
    strict: bool | None = None
    _given: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> "FunctionDefinition":
        found: FunctionDefinition = handler(value)
        if isinstance(value, dict):
            # Null is the same as leaving it out; `strict` is said to the server, in every API.
            found._given = {key: part for key, part in value.items() if part is not None and key != "strict"}
        return found

    @property
    def tool(self) -> Tool:
        """In no API's shape; the model reads the definition with its keys as they came, as in training."""
        return Tool(self.name, self._given, self.parameters)


class ChatTool(Fields):
    """A tool in `/v1/chat/completions`."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Fields):
    """A function by its name."""

    name: Name


class ChatNamed(Fields):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Fields):
    """Tools of which one may or must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ChatNamed], Field(min_length=1, max_length=MOST_TOOLS)]


class ChatAllowed(Fields):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{PREFIX}mode"
    return f"{PREFIX}{'allowed' if value.get('type') == 'allowed_tools' else 'named'}"


Modes = Annotated[Literal["none", "auto", "required"], Tag(f"{PREFIX}mode")]
ChatToolChoice = Annotated[
    Modes | Annotated[ChatNamed, Tag(f"{PREFIX}named")] | Annotated[ChatAllowed, Tag(f"{PREFIX}allowed")], Discriminator(_kind)
]


def chat_choice(choice: str | ChatNamed | ChatAllowed | None, parallel: bool | None) -> Choice:
    """`tool_choice` of `/v1/chat/completions`."""
    several = parallel is not False
    if isinstance(choice, ChatNamed):
        return Choice("required", [choice.function.name], False)
    if isinstance(choice, ChatAllowed):
        return Choice(choice.allowed_tools.mode, [tool.function.name for tool in choice.allowed_tools.tools], several)
    return Choice(choice, None, several)  # type: ignore[arg-type]


class ResponsesTool(Fields):
    """A tool in `/v1/responses`."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Schema | None = Field(None, description="A JSON schema of an object; calls follow it, `strict` or not.")
    strict: bool | None = None
    allowed_callers: only(["direct"], why=ONE_CALLER)  # type: ignore[valid-type]
    defer_loading: only(False, why="all tools stand in the prompt")  # type: ignore[valid-type]
    output_schema: only(why="results are read as they are")  # type: ignore[valid-type]

    @property
    def tool(self) -> Tool:
        """In no API's shape."""
        return Tool(self.name, _definition(self.name, self.description, self.parameters), self.parameters)


class ResponsesNamed(Fields):
    """The tool that must be called."""

    type: Literal["function"]
    name: Name


class ResponsesAllowed(Fields):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponsesNamed], Field(min_length=1, max_length=MOST_TOOLS)]


ResponsesToolChoice = Annotated[
    Modes | Annotated[ResponsesNamed, Tag(f"{PREFIX}named")] | Annotated[ResponsesAllowed, Tag(f"{PREFIX}allowed")],
    Discriminator(_kind),
]


def responses_choice(choice: str | ResponsesNamed | ResponsesAllowed | None, parallel: bool | None) -> Choice:
    """`tool_choice` of `/v1/responses`."""
    several = parallel is not False
    if isinstance(choice, ResponsesNamed):
        return Choice("required", [choice.name], False)
    if isinstance(choice, ResponsesAllowed):
        return Choice(choice.mode, [tool.name for tool in choice.tools], several)
    return Choice(choice, None, several)  # type: ignore[arg-type]


class MessagesTool(Fields):
    """A tool in `/v1/messages`."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: Schema = Field(description="A JSON schema of an object; calls follow it, `strict` or not.")
    strict: bool | None = None
    cache_control: Accepted
    allowed_callers: only(["direct"], why=ONE_CALLER)  # type: ignore[valid-type]
    defer_loading: only(False, why="all tools stand in the prompt")  # type: ignore[valid-type]
    eager_input_streaming: only(True, why="arguments are always sent as they come")  # type: ignore[valid-type]
    input_examples: only([], why="give examples in `description`")  # type: ignore[valid-type]

    @property
    def tool(self) -> Tool:
        """In no API's shape."""
        return Tool(self.name, _definition(self.name, self.description, self.input_schema), self.input_schema)


class MessagesToolChoice(Fields):
    """What must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = Field(None, description="Only with the type `tool`.")
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> "MessagesToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("name_of_tool", "give `name` with the type `tool`, and only with it")
        return self


def messages_choice(choice: MessagesToolChoice | None) -> Choice:
    """`tool_choice` of `/v1/messages`."""
    if choice is None:
        return Choice()
    modes: dict[str, Mode] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
    several = choice.type != "tool" and not choice.disable_parallel_tool_use
    return Choice(modes[choice.type], None if choice.name is None else [choice.name], several)


def _definition(name: str, description: str | None, parameters: Schema | None) -> Schema:
    """A function as the model reads it."""
    given = {"name": name, "description": description, "parameters": parameters}
    return {key: value for key, value in given.items() if value is not None}
