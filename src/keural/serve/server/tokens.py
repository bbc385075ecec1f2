"""Text to ids and back, and what a conversation looks like to the model.

In: texts, conversations, ids. Out: ids, text.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from keural.serve.server.chat import ChatRequest, ChatTurn, Conversation, asked_of, prompt_of
from keural.serve.server.completions import Id
from keural.serve.server.errors import ApiError
from keural.serve.server.fields import Fields
from keural.serve.server.service import Service
from keural.serve.server.tools.definitions import Choice, tool_use


class TokenizeRequest(Conversation):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = Field(None, description="A text; its ids are given as they are, with no token before them.")
    messages: Annotated[list[ChatTurn], Field(min_length=1)] | None = Field(  # type: ignore[assignment]
        None, description="A conversation, as it would be answered."
    )
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of", "give either `prompt` or `messages`")
        if self.prompt is not None and self.tools:
            raise PydanticCustomError("one_of", "`tools` are only for `messages`")
        return self


class DetokenizeRequest(Fields):
    """Token ids."""

    model: str | None = None
    tokens: list[Id]


class RenderRequest(ChatRequest):
    """A request as for an answer."""


async def tokenize(service: Service, fields: TokenizeRequest) -> dict[str, Any]:
    """The ids. Raises `ApiError`."""
    service.check_model(fields.model)
    if fields.messages is not None:
        ids = await prompt_of(service, fields.read(), tool_use(service, fields.offered, Choice("none")).tools)
    else:
        ids = await service.read(service.tokenizer.encode, fields.prompt)
    found: dict[str, Any] = {"count": len(ids), "max_model_len": service.context_length, "tokens": ids}
    if fields.return_token_strs:
        found["token_strs"] = await service.read(_each, service, ids)
    return found


def _each(service: Service, ids: list[int]) -> list[str]:
    names = {token: service.tokenizer.decode([token], skip_special_tokens=False) for token in set(ids)}
    return [names[token] for token in ids]


async def detokenize(service: Service, fields: DetokenizeRequest) -> dict[str, Any]:
    """The text. Raises `ApiError` for ids that the model has not."""
    service.check_model(fields.model)
    if any(token >= service.tokenizer.vocab_size for token in fields.tokens):
        raise ApiError(400, f"`tokens`: token ids go up to {service.tokenizer.vocab_size - 1}", "tokens", "invalid_value")
    return {"prompt": await service.read(service.tokenizer.decode, fields.tokens)}


async def render_chat(service: Service, fields: RenderRequest, headers: Mapping[str, str]) -> dict[str, Any]:
    """The ids that an answer would follow. Raises `ApiError` where there could be none, for whatever reason."""
    requests, _ = await asked_of(service, fields, headers)
    prompt = list(requests[0].prompt_ids)
    return {"token_ids": prompt, "count": len(prompt), "max_model_len": service.context_length}
