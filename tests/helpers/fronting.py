"""Our server before fakes of vLLM and SGLang."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from keural.serve.server.service import Service
from keural.serve.upstream.models import FrontModel
from keural.serve.upstream.opening import CONTRACTS, remote
from keural.serve.upstream.runner import Upstreams
from keural.tokenizer import KeuralTokenizer
from tests.helpers.fake_engines import Engine, fake
from tests.helpers.serving import service_of, serving

KINDS = ("vllm", "sglang")
TEXT = "안녕하세요 👋🏽 the cat 고양이 쀍 e\u0301nd <|im_end|> <bos>."
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
CONTEXT = 400
Front = Callable[..., contextlib.AbstractContextManager["Fronted"]]
"""Takes a kind, engines, and settings of the service."""


class Fronted:
    """Our server before fakes."""

    def __init__(self, client: httpx.Client, service: Service, engines: list[Engine], log: list[Any]) -> None:
        self.client, self.service, self.engines, self.log = client, service, engines, log
        self.engine = engines[0]

    @property
    def upstreams(self) -> Upstreams:
        assert isinstance(self.service.slots, Upstreams)
        return self.service.slots

    def post(self, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
        return self.client.post(path, json=({} if "prompt" in fields else {"messages": HELLO}) | fields)


def an_engine(known: KeuralTokenizer, text: str = TEXT, **changes: Any) -> Engine:
    return Engine([*known.encode(text), known.im_end_id], known.vocab_size, **({"max_model_len": CONTEXT} | changes))


@contextlib.contextmanager
def fronting(
    tokenizer: KeuralTokenizer,
    kind: str,
    *engines: Engine,
    key: str | None = None,
    count: int = 8,
    context: int = CONTEXT,
    **settings: Any,
) -> Iterator[Fronted]:
    """Our server before fakes of a kind."""
    log: list[Any] = []
    model = FrontModel(Path(), tokenizer, context, False)
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(fake(kind, engine)) for engine in engines]
        upstreams = stack.enter_context(remote(CONTRACTS[kind], urls, key, model, "tiny", count, log.append))
        service = service_of(tokenizer, upstreams, **settings)
        yield Fronted(stack.enter_context(serving(service)), service, list(engines), log)
