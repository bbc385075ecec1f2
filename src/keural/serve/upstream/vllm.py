"""vLLM's contract: `POST /inference/v1/generate` of `vllm serve --enable-scale-out`, as the sources of 0.33.0 define it.

In: a request, or an event of a stream. Out: a body, or tokens. What its sources say of the settings:

- Bias comes before the repetition penalty, which counts prompt and answer; log-probabilities (`raw_logprobs`) are those before
  both: all as here. A seed makes a generator of the request's own.
- Temperatures above 2 are refused, those between 0 and 0.01 are raised to 0.01 without a word: both are refused here. `top_p` must
  be above 0; a nucleus of 0 is the most probable token, which a temperature of 0 takes.
- With `ignore_eos` only `stop_token_ids` end an answer; the one that did is the last of `token_ids`.
- `grammar` is Lark, by llguidance or xgrammar as `--structured-outputs-config` has it; one without `::=` is taken for Lark.
- Closing the connection of a stream aborts it.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from keural.errors import UserError
from keural.serve.batching.requests import Chosen, Request
from keural.serve.batching.runner import Unhonoured
from keural.serve.engines.sampling import GREEDY_BELOW
from keural.serve.upstream.contract import (
    Contract,
    Facts,
    Failed,
    Garbage,
    Get,
    Json,
    Launch,
    Part,
    Reader,
    best,
    count_of,
    cut_at_stop,
    form_of,
    is_greedy,
    length_of,
    logprob,
    raise_error,
    the_list,
    the_object,
    token_id,
)

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 2.0
GRAMMARS = '{"backend": "guidance", "disable_any_whitespace": true}'
"""Forms by the library that follows them here, and JSON without blanks, of which a model may write without end."""
FORMS = ("json", "choice", "regex", "grammar")
"""By which a form can be said, the one that is preferred first."""


def unhonoured(request: Request, facts: Facts) -> Unhonoured | None:
    """See `Contract.unhonoured`."""
    temperature = request.sampling.temperature
    if temperature > MOST_TEMPERATURE:
        return Unhonoured("temperature", f"vLLM takes at most {MOST_TEMPERATURE:g}, not {temperature:g}")
    if not is_greedy(request) and GREEDY_BELOW <= temperature < LEAST_TEMPERATURE:
        why = f"vLLM takes 0 or at least {LEAST_TEMPERATURE:g}, and would raise {temperature:g} to that"
        return Unhonoured("temperature", why)
    form = form_of(request)
    if form is not None and not any(kind in form for kind in FORMS):
        return Unhonoured("structured_outputs", "answers of this form cannot be asked of vLLM")
    return None


def body(request: Request, request_id: str, model: str, max_tokens: int, facts: Facts) -> Json:
    """See `Contract.body`."""
    sampling = request.sampling
    params = {
        "max_tokens": max_tokens,
        "temperature": 0.0 if is_greedy(request) else sampling.temperature,
        "top_p": 1.0 if is_greedy(request) else sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": sorted(request.stop_ids),
        "ignore_eos": True,
        "detokenize": False,
    }
    if sampling.seed is not None:
        params["seed"] = sampling.seed
    if request.logit_bias:
        params["logit_bias"] = {str(token): bias for token, bias in request.logit_bias.items()}
    if request.top_logprobs is not None:
        params["logprobs"] = request.top_logprobs
    if form := form_of(request):
        kind = next(kind for kind in FORMS if kind in form)
        params["structured_outputs"] = {kind: form[kind]}
    return {
        "request_id": request_id,
        "model": model,
        "token_ids": list(request.prompt_ids),
        "sampling_params": params,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def reader(request: Request) -> Reader:
    """See `Contract.reader`."""

    def read(event: Json) -> Part:
        if "error" in event:
            raise_error(event["error"])
        choices = the_list(event.get("choices"), "choices")
        if not choices:
            return Part(cached=_cached(event.get("usage")))
        choice = the_object(choices[0], "a choice")
        if len(choices) != 1 or choice.get("index") != 0:
            raise Garbage("gave choices that were not asked for")
        ids = [token_id(value) for value in the_list(choice.get("token_ids") or [], "token ids")]
        return cut_at_stop(_with_logprobs(ids, choice.get("logprobs"), request.top_logprobs), request, choice.get("finish_reason"))

    return read


def _cached(usage: object) -> int | None:
    """The tokens of a prompt that were held, which are told with `--enable-prompt-tokens-details` alone."""
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    return count_of(details.get("cached_tokens")) if isinstance(details, dict) else None


def _with_logprobs(ids: Sequence[int], logprobs: object, top: int | None) -> list[Chosen]:
    """Tokens, with their log-probabilities where these were asked for."""
    if top is None:
        return [Chosen(token) for token in ids]
    content = the_list(the_object(logprobs, "log-probabilities").get("content") or [], "log-probabilities")
    if len(content) != len(ids):
        raise Garbage("gave tokens without their log-probabilities")
    return [_chosen(token, the_object(entry, "a log-probability"), top) for token, entry in zip(ids, content, strict=True)]


def _chosen(token: int, entry: Json, top: int) -> Chosen:
    """A token with the best others: the sampled one comes first, beside the best where it is none of them."""
    if entry.get("token_id") != token:
        raise Garbage("gave log-probabilities of another token")
    found = [the_object(other, "a log-probability") for other in the_list(entry.get("top_logprobs") or [], "log-probabilities")]
    others = [(token_id(other.get("token_id")), logprob(other.get("logprob"))) for other in found]
    rank = count_of(entry.get("rank")) or 0
    if len(others) < top or (len(others) == top and rank > top):  # as releases before 0.33, which leave out the last of the best
        raise Garbage("gave fewer log-probabilities than were asked for")
    return Chosen(token, logprob(entry.get("logprob")), best(others if len(others) == top else others[1:], top))


async def facts(get: Get, model: str) -> Facts:
    """See `Contract.facts`."""
    listed = the_list(the_object(await get("/v1/models"), "models").get("data"), "models")
    served = {card.get("id"): card for card in listed if isinstance(card, dict)}
    if model not in served:
        names = ", ".join(map(repr, served)) or "nothing"
        raise Failed(f"serves {names}, not {model!r}: start it with --served-model-name {model}, or name its model with --name")
    return Facts(length_of(served[model].get("max_model_len"), 2))


def probe(model: str, token: int) -> Json:
    """See `Contract.probe`."""
    params = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "logit_bias": {str(token): 0.0}}
    return {"model": model, "token_ids": [0], "sampling_params": params, "stream": False}


def launch(export: Path, name: str, port: int, key: str, more: Sequence[str]) -> Launch:
    """See `Contract.launch`."""
    beside = Path(sys.executable).with_name("vllm")
    program = shutil.which("vllm") or (str(beside) if os.access(beside, os.X_OK) else None)
    if program is None:
        raise UserError("vLLM is not installed here; install it with `pip install vllm`, or name its server with --upstream")
    arguments = ["--enable-scale-out", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name, "--structured-outputs-config", GRAMMARS]
    return Launch([program, "serve", str(export), *arguments, *where, *more], {"VLLM_API_KEY": key})


VLLM = Contract("vllm", "vllm", "/inference/v1/generate", unhonoured, body, reader, facts, probe, None, launch)
