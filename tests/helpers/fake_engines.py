"""Servers that speak vLLM's and SGLang's contracts of ids, and write what a test wants.

They are strict: a field that the real server does not know, or would change without a word, is refused, so that a test fails that
sends one. What they check was read in the sources of vLLM 0.33.0 and SGLang 0.5.23. They can be run in a thread or, as
`python -m tests.helpers.fake_engines KIND …`, as a process.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.helpers.serving import PATIENCE, wait_until

OTHER = -2.0
"""Log-probability of the best token that does not come."""


@dataclass
class Engine:
    """What a fake does and has seen. A test may change it at any time."""

    ids: Sequence[int]
    """What it writes, whatever it is asked; an end among them ends it."""
    vocab_size: int
    name: str = "tiny"
    max_model_len: int = 400
    key: str | None = None
    scale_out: bool = True
    """vLLM: --enable-scale-out."""
    cached: int | None = 3
    """Tokens of the prompt that it says it held; vLLM tells with --enable-prompt-tokens-details alone."""
    most_listed: int | None = None
    """vLLM before 0.33: of the log-probabilities at a place."""
    incremental: bool = True
    """SGLang: --incremental-streaming-output."""
    deterministic: bool = False
    """SGLang: --enable-deterministic-inference."""
    tokenizer: bool = False
    """SGLang: without --skip-tokenizer-init."""
    grammar_backend: Any = "xgrammar"
    """SGLang: --grammar-backend."""
    chunk: int = 1
    """Tokens in an event."""
    healthy: bool = True
    status: int = 200
    """Of every answer to a request for tokens of a client."""
    pause: Callable[[int], float] = lambda place: 0.0
    """Seconds before the token at a place."""
    break_at: int | None = None
    """A place where the connection breaks."""
    spoil: Callable[[dict[str, Any]], Any] = lambda event: event
    """Changes an event; bytes are sent as they are."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies that were asked to stream."""
    running: int = 0
    ended: int = 0
    """Streams that went to their end."""
    given_up: list[str] = field(default_factory=list)
    """Requests whose client left, or that were aborted by name."""

    def pieces(self, stops: Sequence[int], most: int) -> list[int]:
        """The tokens of an answer, with the one that ends it."""
        found: list[int] = []
        for token in self.ids:
            found.append(token)
            if token in stops or len(found) == most:
                return found
        raise AssertionError("the script of the fake has no end")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Forms(Strict):
    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


Id = Annotated[int, Field(ge=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
Bias = dict[Annotated[str, Field(pattern="^[0-9]+$")], float]


class VllmParams(Strict):
    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0, le=2)]
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    stop_token_ids: list[Id] = []
    ignore_eos: bool = False
    detokenize: bool = True
    seed: int | None = None
    logit_bias: Bias | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    structured_outputs: Forms | None = None


class StreamOptions(Strict):
    include_usage: bool


class VllmRequest(Strict):
    request_id: str | None = None
    model: str
    token_ids: Annotated[list[Id], Field(min_length=1)]
    sampling_params: VllmParams
    stream: bool
    stream_options: StreamOptions | None = None


class SglangParams(Strict):
    max_new_tokens: Annotated[int, Field(ge=0)]
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Literal[-1] = -1
    min_p: Zero = 0.0
    frequency_penalty: Zero = 0.0
    presence_penalty: Zero = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    stop_token_ids: list[Id] = []
    sampling_seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: Bias | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None


class SglangRequest(Strict):
    rid: str | None = None
    input_ids: Annotated[list[Id], Field(min_length=1)]
    sampling_params: SglangParams
    stream: bool
    return_logprob: bool = False
    top_logprobs_num: Annotated[int, Field(ge=0)] = 0
    return_text_in_logprobs: bool = False


def refused(message: str, status: int = 400) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


def unread(grammar: str) -> str | None:
    """What llguidance finds wrong in a grammar, taken as both servers take one."""
    import llguidance

    found: str = llguidance.LLMatcher.validate_grammar(llguidance.grammar_from("grammar", grammar), None)
    return found or None


def own(place: int) -> float:
    """The log-probability of the token at a place: every other one is the best, and the next is none of the best."""
    return -0.25 if place % 2 == 0 else -60.0


def entries(token: int, place: int, top: int) -> list[tuple[int, float]]:
    """The `top` best tokens at a place with their log-probabilities."""
    best = [(token, own(place))] if place % 2 == 0 else []
    others = [number for number in range(top + 1) if number != token]
    return [*best, *((other, OTHER - rank) for rank, other in enumerate(others))][:top]


class Fake:
    """What both kinds have in common."""

    path = ""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/health", self.health), Route(self.path, self.generate, methods=["POST"]), *self.routes()])

    def routes(self) -> list[Route]:
        raise NotImplementedError

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self.engine.healthy else 503)

    def admits(self, request: Request) -> bool:
        return self.engine.key is None or request.headers.get("authorization") == f"Bearer {self.engine.key}"

    async def generate(self, request: Request) -> Response:
        raise NotImplementedError

    async def stream(self, request_id: str, chunks: Sequence[Any], last: Sequence[Any] = ()) -> AsyncIterator[bytes]:
        """Events of an answer; each of `chunks` has the place of its first token and an event."""
        engine, whole = self.engine, False
        engine.running += 1
        try:
            for place, event in chunks:
                await asyncio.sleep(engine.pause(place))
                if engine.break_at is not None and place >= engine.break_at:
                    raise ConnectionAbortedError("as the test wants it")
                spoiled = engine.spoil(event)
                yield spoiled if isinstance(spoiled, bytes) else f"data: {json.dumps(spoiled)}\n\n".encode()
            for event in last:
                yield f"data: {json.dumps(event)}\n\n".encode()
            yield b"data: [DONE]\n\n"
            whole = True
        finally:
            engine.running -= 1
            engine.ended += whole
            if not whole:
                engine.given_up.append(request_id)


class Vllm(Fake):
    """`vllm serve --enable-scale-out`."""

    path = "/inference/v1/generate"

    def routes(self) -> list[Route]:
        return [Route("/v1/models", self.models)]

    async def models(self, request: Request) -> Response:
        if not self.admits(request):
            return JSONResponse({"error": "Unauthorized"}, 401)
        card = {"id": self.engine.name, "object": "model", "root": "/models/x", "max_model_len": self.engine.max_model_len}
        return JSONResponse({"object": "list", "data": [card]})

    async def generate(self, request: Request) -> Response:
        engine = self.engine
        if not self.admits(request):
            return JSONResponse({"error": "Unauthorized"}, 401)
        if not engine.scale_out:
            return JSONResponse(refused("Scale-out endpoints are disabled.", 403), 403)
        values = await request.json()
        try:
            asked = VllmRequest.model_validate(values)
        except ValidationError as error:
            return JSONResponse(refused(str(error)), 400)
        params = asked.sampling_params
        if asked.model != engine.name:
            return JSONResponse(refused(f"The model `{asked.model}` does not exist.", 404), 404)
        assert params.temperature == 0 or params.temperature >= 0.01, "vLLM would raise the temperature"
        if not asked.stream:
            return JSONResponse(self.whole(asked), 400 if self.problem(asked) else 200)
        engine.requests.append(values)
        if engine.status != 200:
            return JSONResponse(refused("as the test wants it", engine.status), engine.status)
        return StreamingResponse(self.answer(asked), media_type="text/event-stream")

    def problem(self, asked: VllmRequest) -> str | None:
        """What the engine finds, after the request was taken."""
        known = [*asked.token_ids, *map(int, asked.sampling_params.logit_bias or {}), *asked.sampling_params.stop_token_ids]
        if max(known) >= self.engine.vocab_size:
            return "token_id(s) contain out-of-vocab token ids"
        if len(asked.token_ids) >= self.engine.max_model_len:
            return "The prompt is longer than the maximum model length"
        forms = asked.sampling_params.structured_outputs
        if forms and forms.grammar is not None:
            return unread(forms.grammar)
        return "the engine knows no such form" if forms and forms.regex == "(?=a)" else None

    def whole(self, asked: VllmRequest) -> dict[str, Any]:
        problem = self.problem(asked)
        return refused(problem) if problem else {"choices": [{"index": 0, "finish_reason": "length", "token_ids": [0]}]}

    def answer(self, asked: VllmRequest) -> AsyncIterator[bytes]:
        problem, params, engine = self.problem(asked), asked.sampling_params, self.engine
        if problem is not None:
            return self.stream("refused", [(0, refused(problem))])
        assert params.ignore_eos, "an end of the model's own configuration may be another one than ours"
        tokens = engine.pieces(params.stop_token_ids, min(params.max_tokens, engine.max_model_len - len(asked.token_ids)))
        chunks = []
        for start in range(0, len(tokens), engine.chunk):
            part = tokens[start : start + engine.chunk]
            last = start + engine.chunk >= len(tokens)
            choice = {
                "index": 0,
                "token_ids": part,
                "finish_reason": None if not last else "stop" if part[-1] in params.stop_token_ids else "length",
                "stop_reason": part[-1] if last and part[-1] in params.stop_token_ids else None,
                "logprobs": None if params.logprobs is None else {"content": self.logprobs(part, start, params.logprobs)},
            }
            chunks.append((start, {"request_id": "generate-tokens-x", "output_mode": "tokens", "choices": [choice], "usage": None}))
        usage: dict[str, Any] = {"prompt_tokens": len(asked.token_ids), "completion_tokens": len(tokens)}
        if engine.cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": engine.cached}
        return self.stream(asked.request_id or "", chunks, [{"output_mode": "tokens", "choices": [], "usage": usage}])

    def logprobs(self, part: Sequence[int], start: int, top: int) -> list[dict[str, Any]]:
        """The sampled token first, then the best: one entry more where it is none of them."""
        found = []
        for place, token in enumerate(part, start):
            rest = [entry for entry in entries(token, place, top) if entry[0] != token]
            listed = [(token, own(place)), *rest]
            others = [{"token_id": other, "logprob": value, "rank": None} for other, value in listed]
            rank = 1 if place % 2 == 0 else 1000
            found.append(
                {"token_id": token, "logprob": own(place), "rank": rank, "top_logprobs": others[: self.engine.most_listed]}
            )
        return found


class Sglang(Fake):
    """`python -m sglang.launch_server`."""

    path = "/generate"

    def routes(self) -> list[Route]:
        names = {"/v1/models": self.models, "/model_info": self.model_info, "/server_info": self.server_info}
        return [Route("/abort_request", self.abort, methods=["POST"]), *(Route(path, call) for path, call in names.items())]

    def guarded(self, request: Request, value: Any) -> Response:
        return JSONResponse(value) if self.admits(request) else JSONResponse({"error": "Unauthorized"}, 401)

    async def models(self, request: Request) -> Response:
        return self.guarded(request, {"data": [{"id": self.engine.name, "max_model_len": self.engine.max_model_len}]})

    async def model_info(self, request: Request) -> Response:
        return self.guarded(request, {"served_model_name": self.engine.name, "model_path": "/models/x", "is_generation": True})

    async def server_info(self, request: Request) -> Response:
        engine = self.engine
        value = {"enable_deterministic_inference": engine.deterministic, "skip_tokenizer_init": not engine.tokenizer}
        value["grammar_backend"] = engine.grammar_backend
        return self.guarded(request, value | {"incremental_streaming_output": engine.incremental, "version": "0.5.23"})

    async def abort(self, request: Request) -> Response:
        if not self.admits(request):
            return JSONResponse({"error": "Unauthorized"}, 401)
        values = await request.json()
        assert set(values) <= {"rid", "abort_all"}
        self.engine.given_up.append(f"by name: {values['rid']}")
        return Response()

    async def generate(self, request: Request) -> Response:
        engine = self.engine
        if not self.admits(request):
            return JSONResponse({"error": "Unauthorized"}, 401)
        values = await request.json()
        try:
            asked = SglangRequest.model_validate(values)
        except ValidationError as error:
            return JSONResponse({"error": {"message": str(error)}}, 400)
        problem = self.problem(asked)
        if not asked.stream:
            return JSONResponse(
                {"error": {"message": problem}} if problem else {"output_ids": [0], "meta_info": {}}, 400 if problem else 200
            )
        engine.requests.append(values)
        if engine.status != 200:
            return JSONResponse({"error": {"message": "as the test wants it"}}, engine.status)
        return StreamingResponse(self.answer(asked, problem), media_type="text/event-stream")

    def problem(self, asked: SglangRequest) -> str | None:
        params, engine = asked.sampling_params, self.engine
        if max([*asked.input_ids, *map(int, params.logit_bias or {})]) >= engine.vocab_size:
            return f"logit_bias must has keys in [0, {engine.vocab_size - 1}]"
        if len(asked.input_ids) + params.max_new_tokens > engine.max_model_len:
            return "Requested token count exceeds the model's maximum context length"
        forms = [form for form in (params.json_schema, params.regex, params.ebnf, params.structural_tag) if form is not None]
        if forms and not engine.tokenizer:
            return "Grammar-based generation is not supported"
        if len(forms) > 1 or (params.structural_tag and engine.grammar_backend != "xgrammar"):
            return "the engine follows another form than it is asked for"
        if params.ebnf is not None:
            return unread(params.ebnf) if engine.grammar_backend == "llguidance" else "expected a rule of EBNF"
        return "the engine knows no such form" if params.regex == "(?=a)" else None

    def answer(self, asked: SglangRequest, problem: str | None) -> AsyncIterator[bytes]:
        params, engine = asked.sampling_params, self.engine
        if problem is not None:
            error = {"message": problem, "type": "invalid_request_error", "code": 400, "retryable": False}
            return self.stream("refused", [(0, {"error": error})])
        most = max(0, min(params.max_new_tokens, engine.max_model_len - 1 - len(asked.input_ids) - 1))
        tokens = engine.pieces(params.stop_token_ids, most)
        chunks = []
        for start in range(0, len(tokens), engine.chunk):
            end = min(start + engine.chunk, len(tokens))
            first = start if engine.incremental else 0
            meta: dict[str, Any] = {
                "id": asked.rid,
                "prompt_tokens": len(asked.input_ids),
                "completion_tokens": end,
                "cached_tokens": 3,
            }
            if engine.cached is None:
                del meta["cached_tokens"]
            stopped = tokens[end - 1] in params.stop_token_ids
            how = {"type": "stop", "matched": tokens[end - 1]} if stopped else {"type": "length", "length": end}
            meta["finish_reason"] = how if end == len(tokens) else None
            if asked.return_logprob:
                meta["output_token_logprobs"] = [[own(place), token, None] for place, token in enumerate(tokens[first:end], first)]
                meta["output_top_logprobs"] = [
                    [[value, other, None] for other, value in entries(token, place, asked.top_logprobs_num)] or None
                    for place, token in enumerate(tokens[first:end], first)
                ]
            chunks.append((start, {"output_ids": tokens[first:end], "meta_info": meta}))
        return self.stream(asked.rid or "", chunks)


FAKES: dict[str, type[Fake]] = {"vllm": Vllm, "sglang": Sglang}


@contextlib.contextmanager
def fake(kind: str, engine: Engine) -> Iterator[str]:
    """A fake on a free port; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(_config(kind, engine))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def _config(kind: str, engine: Engine, port: int = 0) -> uvicorn.Config:
    return uvicorn.Config(FAKES[kind](engine).app(), port=port, log_config=None, lifespan="off", timeout_graceful_shutdown=0)


def main(arguments: Sequence[str]) -> None:
    """Be `vllm serve …` or `python -m sglang.launch_server …`; what to do is in $FAKE_ENGINE, a JSON object."""
    kind, *rest = arguments
    told = json.loads(os.environ["FAKE_ENGINE"])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    flags = {"vllm": ["--enable-scale-out", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]}.get(
        kind, ["--skip-tokenizer-init", "--incremental-streaming-output"]
    )
    for flag in flags:
        parser.add_argument(flag, action="store_true", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    if kind == "vllm":
        parser.add_argument("--structured-outputs-config", type=json.loads, required=True)
        parser.add_argument("command", choices=["serve"])
        parser.add_argument("model")
    else:
        parser.add_argument("--model-path", dest="model", required=True)
        parser.add_argument("--config", required=True)
        parser.add_argument("--log-level-http", choices=["warning"])
    given = parser.parse_args(rest)
    assert given.host == "127.0.0.1"
    with open(os.path.join(given.model, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    assert config["architectures"] == ["GraniteMoeSWAForCausalLM"], "no export"
    if "die" in told:
        print("loading the weights", flush=True)
        sys.exit(told["die"])
    if kind == "vllm":
        key = os.environ["VLLM_API_KEY"]
    else:
        assert os.environ["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "1"
        with open(given.config, encoding="utf-8") as file:
            key = json.loads(file.read().removeprefix("api-key: "))
    assert len(key) >= 32
    assert key not in " ".join(arguments), "the key can be seen among the processes"
    slow = told.get("pause", 0.0)
    engine = Engine(
        told["ids"], config["vocab_size"], given.served_model_name, config["max_position_embeddings"], key, pause=lambda place: slow
    )
    print("the engine is ready", os.getpid(), flush=True)
    uvicorn.Server(_config(kind, engine, given.port)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
