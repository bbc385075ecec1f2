"""SGLang's contract: `POST /generate` of `sglang.launch_server`, as the sources of 0.5.23 define it.

In: a request, or an event of a stream. Out: a body, or tokens. What its sources say of the settings:

- The repetition penalty counts the answer alone, and not the prompt: any other than 1 is refused here.
- A seed counts with `--enable-deterministic-inference` alone, where a request without one has the seed 42: it is given one here.
- Log-probabilities are those after the bias and the temperature; with `SGLANG_RETURN_ORIGINAL_LOGPROB` before the temperature. They
  are those of the network where there is no bias and no form, and the temperature is 0 or 1 or that variable is set.
- Forms need a tokenizer, which `--skip-tokenizer-init` leaves out. Of calls xgrammar (the `--grammar-backend` by default) takes a
  structural tag, and llguidance Lark, called `ebnf`; outlines takes neither.
- An answer ends at a token of the model's own configuration or of `stop_token_ids`, which is the last of `output_ids`.
  `ignore_eos` would ignore both.
- `output_ids` are all up to here, or with `--incremental-streaming-output` the new ones; `completion_tokens` tells which.
- Two tokens of the context stay free.
- A closed connection is noticed after two seconds: the request is aborted by name.
"""

import importlib.util
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from keural.errors import UserError
from keural.limits import LARGEST_SEED
from keural.serve.batching.requests import Chosen, Request
from keural.serve.batching.runner import Unhonoured
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

KEPT_FREE = 2
"""Tokens of the context that no answer gets."""
CALLS: Mapping[str, Literal["grammar", "structural_tag"]] = {"xgrammar": "structural_tag", "llguidance": "grammar"}
"""How the form of calls is said, by the library that follows it."""
ORIGINAL = "SGLANG_RETURN_ORIGINAL_LOGPROB"


def unhonoured(request: Request, facts: Facts) -> Unhonoured | None:
    """See `Contract.unhonoured`."""
    sampling, form = request.sampling, form_of(request)
    if sampling.repetition_penalty != 1:
        why = (
            f"SGLang counts the answer alone and not the prompt, so that {sampling.repetition_penalty:g} means something else there"
        )
        return Unhonoured("repetition_penalty", f"{why}; use 1 (`keural serve --repetition-penalty 1` makes it the default)")
    if sampling.seed is not None and not facts.seeds and not is_greedy(request):
        return Unhonoured("seed", "SGLang keeps one only with --enable-deterministic-inference")
    if form is not None and not facts.forms:
        param = "tools" if "grammar" in form else "structured_outputs"
        return Unhonoured(param, "SGLang follows forms only without --skip-tokenizer-init")
    if form is not None and "grammar" in form and facts.calls is None:
        return Unhonoured("tools", "SGLang follows the form of calls only with --grammar-backend xgrammar or llguidance")
    if form is not None and not ({"json", "regex", "grammar"} & form.keys()):
        return Unhonoured("structured_outputs", "answers of this form cannot be asked of SGLang")
    if request.top_logprobs is not None:
        return _unlike_logprobs(request, facts)
    return None


def _unlike_logprobs(request: Request, facts: Facts) -> Unhonoured | None:
    """Why log-probabilities would not be the network's own."""
    if request.logit_bias:
        return Unhonoured("logprobs", "SGLang gives those after `logit_bias`; leave one of the two out")
    if request.constraint is not None:
        return Unhonoured("logprobs", "SGLang gives those within the form that the answer has; leave one of the two out")
    if not facts.plain_logprobs and not is_greedy(request) and request.sampling.temperature != 1:
        return Unhonoured("logprobs", f"SGLang gives those after the temperature unless {ORIGINAL} is set; use temperature 0 or 1")
    return None


def body(request: Request, request_id: str, model: str, max_tokens: int, facts: Facts) -> Json:
    """See `Contract.body`; all settings are given, for a server may have others of its own."""
    sampling, form = request.sampling, form_of(request) or {}
    params = {
        "max_new_tokens": max_tokens,
        "temperature": 0.0 if is_greedy(request) else sampling.temperature,
        "top_p": 1.0 if is_greedy(request) else sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": sorted(request.stop_ids),
        "sampling_seed": sampling.seed if sampling.seed is not None else random.SystemRandom().randint(0, LARGEST_SEED),
    }
    if request.logit_bias:
        params["logit_bias"] = {str(token): bias for token, bias in request.logit_bias.items()}
    if "json" in form:
        params["json_schema"] = json.dumps(form["json"])
    elif "regex" in form:
        params["regex"] = form["regex"]
    elif facts.calls == "structural_tag" and "structural_tag" in form:
        params["structural_tag"] = json.dumps(form["structural_tag"])
    elif "grammar" in form:
        params["ebnf"] = form["grammar"]
    asked = {"rid": request_id, "input_ids": list(request.prompt_ids), "sampling_params": params, "stream": True}
    if request.top_logprobs is not None:
        asked |= {"return_logprob": True, "top_logprobs_num": request.top_logprobs, "return_text_in_logprobs": False}
    return asked


def reader(request: Request) -> Reader:
    """See `Contract.reader`."""
    seen = 0

    def read(event: Json) -> Part:
        nonlocal seen
        if "error" in event:
            raise_error(event["error"])
        meta = the_object(event.get("meta_info"), "an answer's description")
        finish = the_object(meta.get("finish_reason") or {}, "an end")
        kind = finish.get("type")
        if kind == "abort":
            raise_error({"message": finish.get("message"), "code": finish.get("status_code")})
        ids = the_list(event.get("output_ids"), "token ids")
        count = meta.get("completion_tokens")
        new = count - seen if isinstance(count, int) else -1
        if not 0 <= new <= len(ids):
            raise Garbage("gave another number of tokens than it says")
        seen += new
        tokens = _with_logprobs([token_id(value) for value in ids[len(ids) - new :]], meta, request.top_logprobs)
        part = cut_at_stop(tokens, request, kind)
        return Part(part.tokens, part.end, count_of(meta.get("cached_tokens")))

    return read


def _with_logprobs(ids: Sequence[int], meta: Json, top: int | None) -> list[Chosen]:
    """Tokens, with their log-probabilities where these were asked for: those of the last tokens are the last of the lists."""
    if top is None or not ids:
        return [Chosen(token) for token in ids]
    own = the_list(meta.get("output_token_logprobs"), "log-probabilities")[-len(ids) :]
    others = the_list(meta.get("output_top_logprobs"), "log-probabilities")[-len(ids) :] if top else [[]] * len(ids)
    if len(own) != len(ids) or len(others) != len(ids):
        raise Garbage("gave tokens without their log-probabilities")
    return [_chosen(*found, top) for found in zip(ids, map(_entry, own), others, strict=True)]


def _chosen(token: int, own: tuple[int, float], others: object, top: int) -> Chosen:
    if own[0] != token:
        raise Garbage("gave log-probabilities of another token")
    return Chosen(token, own[1], best([_entry(other) for other in the_list(others or [], "log-probabilities")], top))


def _entry(value: object) -> tuple[int, float]:
    """`[log-probability, id, text]`."""
    entry = the_list(value, "a log-probability")
    if len(entry) != 3:
        raise Garbage("gave a log-probability of another shape")
    return token_id(entry[1]), logprob(entry[0])


async def facts(get: Get, model: str) -> Facts:
    """See `Contract.facts`."""
    info = the_object(await get("/model_info"), "a description of the model")
    if info.get("served_model_name") != model:
        raise Failed(f"serves {info.get('served_model_name')!r}, not {model!r}: start it with --served-model-name {model}, or name "
                     "its model with --name")  # fmt: skip
    listed = the_list(the_object(await get("/v1/models"), "models").get("data"), "models")
    length = next((card.get("max_model_len") for card in listed if isinstance(card, dict) and card.get("id") == model), None)
    settings = the_object(await get("/server_info"), "settings")
    return Facts(
        length_of(length, 2 + KEPT_FREE) - KEPT_FREE,
        seeds=settings.get("enable_deterministic_inference") is True,
        forms=settings.get("skip_tokenizer_init") is False,
        calls=CALLS.get(str(settings.get("grammar_backend"))),
        plain_logprobs=False,
    )


def probe(model: str, token: int) -> Json:
    """See `Contract.probe`."""
    params = {"max_new_tokens": 1, "temperature": 0.0, "logit_bias": {str(token): 0.0}}
    return {"input_ids": [0], "sampling_params": params, "stream": False}


def abort(request_id: str) -> tuple[str, Json]:
    """See `Contract.abort`."""
    return "/abort_request", {"rid": request_id}


def launch(export: Path, name: str, port: int, key: str, more: Sequence[str]) -> Launch:
    """See `Contract.launch`."""
    if importlib.util.find_spec("sglang") is None:
        raise UserError("SGLang is not installed here; install it with `pip install sglang`, or name its server with --upstream")
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(export), "--skip-tokenizer-init"]
    arguments = [
        "--incremental-streaming-output",
        "--log-level-http",
        "warning",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        name,
    ]
    config = ("--config", f"api-key: {json.dumps(key)}\n")
    return Launch([*command, *arguments, *more], {ORIGINAL: "1"}, config)


SGLANG = Contract("sglang", "sglang", "/generate", unhonoured, body, reader, facts, probe, abort, launch)
