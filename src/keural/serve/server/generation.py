"""From the fields that all generating addresses share to requests for the network.

In: fields, prompts as ids. Out: requests, `n` for each prompt.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from keural.limits import LARGEST_SEED
from keural.serve.batching.requests import Request
from keural.serve.constrain import OPTIONS, Form
from keural.serve.engines.sampling_params import SamplingParams
from keural.serve.server.errors import ApiError, to_json
from keural.serve.server.fields import LONGEST_SCHEMA, MOST_ANSWERS, Generation, Settings
from keural.serve.server.service import Service

TIMEOUT_HEADER = "x-request-timeout"


def sampling_of(service: Service, fields: Settings, max_tokens: int | None) -> SamplingParams:
    """The settings of a request; where it gives none, the model's."""
    given = {
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "repetition_penalty": fields.repetition_penalty,
        "max_new_tokens": max_tokens,
        "seed": fields.seed,
    }
    return replace(service.defaults, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def settings_of(fields: Settings) -> Generation:
    """The settings of a request that has none of the other fields."""
    return Generation.model_validate(fields.model_dump(include={*Settings.model_fields}))


def requests_of(
    service: Service,
    fields: Generation,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    top_logprobs: int | None,
    headers: Mapping[str, str],
    form: Form | None = None,
) -> list[Request]:
    """Requests for every prompt; of several answers to one, each has the next seed."""
    n = fields.n or 1
    if n * len(prompts) > min(MOST_ANSWERS, service.limits.waiting + service.slots.count):
        most = min(MOST_ANSWERS, service.limits.waiting + service.slots.count)
        raise ApiError(400, f"{len(prompts)} prompts with {n} answers each; at most {most} answers", "n", "invalid_value")
    bias = {int(token): value for token, value in (fields.logit_bias or {}).items()}
    if any(token >= service.tokenizer.vocab_size for token in bias):
        raise ApiError(400, f"`logit_bias`: token ids go up to {service.tokenizer.vocab_size - 1}", "logit_bias", "invalid_value")
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(400, "`stream_options` is only for `stream: true`", "stream_options", "invalid_value")
    requests = [
        Request(
            prompt_ids=prompt,
            sampling=sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + choice) % (LARGEST_SEED + 1)),
            stop_ids={service.tokenizer.im_end_id, service.tokenizer.eos_id},
            logit_bias=bias,
            top_logprobs=top_logprobs,
            constraint=None if form is None else form.fresh(),
            seconds=_seconds(service, headers),
        )
        for prompt in prompts
        for choice in range(n)
    ]
    unhonoured = service.answers.scheduler.unhonoured(requests[0])
    if unhonoured is not None:
        raise ApiError(400, f"`{unhonoured.param}`: {unhonoured.why}", unhonoured.param, "unsupported_parameter")
    return requests


async def form_of(service: Service, fields: Generation, schema: Mapping[str, Any] | None = None, param: str = "") -> Form | None:
    """The form that answers must have, by `structured_outputs` or a schema. Raises `ApiError` for one that cannot be followed."""
    asked = fields.structured_outputs
    if asked is not None and schema is not None:
        raise ApiError(400, f"give either `structured_outputs` or `{param}`", "structured_outputs", "invalid_value")
    if asked is not None:
        schema, param = asked.json_schema, "structured_outputs"
    if schema is not None:
        if len(to_json(schema)) > LONGEST_SCHEMA:
            raise ApiError(400, f"`{param}`: a schema may have {LONGEST_SCHEMA:,} bytes", param, "invalid_value")
        schema = {key: part for key, part in schema.items() if key != OPTIONS}  # it would take what it cannot follow
        form = await service.read(service.grammars.json, schema, param=param)
        form.asked = {"json": schema}
        return form
    if asked is None:
        return None
    pattern = asked.regex or "|".join(_LITERAL.sub(r"\\\g<0>", choice) for choice in asked.choice or ())
    form = await service.read(service.grammars.regex, pattern, param=param)
    form.asked = {"regex": pattern} | ({"choice": asked.choice} if asked.choice else {})
    return form


_LITERAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")
"""Characters that mean something in a regular expression."""


def _seconds(service: Service, headers: Mapping[str, str]) -> float:
    """The deadline of a request, which a header may lower."""
    asked = headers.get(TIMEOUT_HEADER)
    if asked is None:
        return service.limits.deadline
    try:
        seconds = float(asked)
    except ValueError:
        seconds = 0
    if not seconds > 0:
        raise ApiError(400, "the header X-Request-Timeout is not a number of seconds", TIMEOUT_HEADER, "invalid_value")
    return min(seconds, service.limits.deadline)
