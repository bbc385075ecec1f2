"""Every operation of `/openapi.json`, with what its description allows and what it does not (schemathesis): nothing is answered
with 500 or more, every status and every body is as described, nothing that is wrong is taken, and nobody is let in without a key.

That something is refused which the description allows is no failure: what a text, a schema or an expression may be, and whether a
prompt has room, no description says.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from keural.serve.server.app import make_app
from keural.serve.server.description import ANSWERS
from keural.serve.server.gate import OPEN
from keural.serve.server.keys import Keys
from keural.serve.server.service import Service
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import Writing, quick, service_of, serving, wait_until

ROOT = Path(__file__).resolve().parents[3]
KEY = "first-key"
NEEDED = pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed (extra dev)")


@pytest.fixture
def service(tokenizer: KeuralTokenizer) -> Service:
    return service_of(tokenizer, Writing(tokenizer, "the cat 고양이 <|im_end|>", count=4), keys=Keys([KEY]))


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with serving(service) as opened:
        opened.headers["X-Api-Key"] = KEY
        yield opened


def fuzz(client: httpx.Client, tmp_path: Path, *options: str, description: Any = None) -> str:
    """What schemathesis reports of a server; empty where it found nothing."""
    (tmp_path / "openapi.json").write_text(json.dumps(description or client.get("/openapi.json").json()), encoding="utf-8")
    command = [
        sys.executable, "-m", "schemathesis.cli", "--no-color", "run", str(tmp_path / "openapi.json"),
        "--url", str(client.base_url), "--exclude-checks", "positive_data_acceptance", "--continue-on-failure",
        "--request-timeout", "240", "--suppress-health-check", "too_slow", *options,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "KEURAL_FUZZ_KEY": KEY,
        "SCHEMATHESIS_HOOKS": "tests.helpers.fuzz_hooks",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert found.returncode in (0, 1), found.stdout + found.stderr
    return found.stdout if found.returncode else ""


def check_whole(service: Service, client: httpx.Client) -> None:
    """Nothing is lost: no answer is under way, and the next one comes."""
    wait_until(lambda: service.answers.open == 0)
    assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    assert service.answers.scheduler.running == 0


@NEEDED
def test_a_few_requests_to_every_operation(service: Service, client: httpx.Client, tmp_path: Path) -> None:
    report = fuzz(client, tmp_path, "--phases", "fuzzing", "--max-examples", "2", "--seed", "1", "--no-shrink")

    assert not report, report

    check_whole(service, client)


@NEEDED
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_requests_to_every_operation(service: Service, client: httpx.Client, tmp_path: Path, seed: int) -> None:
    options = ("--phases", "examples,coverage,fuzzing", "--max-time", "90", "--seed", str(seed))

    report = fuzz(client, tmp_path, *options)

    assert not report, report

    check_whole(service, client)


@NEEDED
def test_a_wrong_description_is_found(client: httpx.Client, tmp_path: Path) -> None:
    description = client.get("/openapi.json").json()
    description["paths"] = {path: description["paths"][path] for path in ("/version", "/v1/models/{name}")}
    description["paths"]["/version"]["get"]["responses"]["200"]["content"]["application/json"]["schema"] = {"type": "array"}
    del description["paths"]["/v1/models/{name}"]["get"]["responses"]["404"]

    report = fuzz(client, tmp_path, "--phases", "fuzzing", "--max-examples", "3", "--seed", "1", description=description)

    assert "violates schema" in report
    assert "Undocumented status code" in report


def test_every_address_is_described(tokenizer: KeuralTokenizer) -> None:
    described = make_app(service_of(tokenizer, Writing(tokenizer, "x")))._app.openapi()  # type: ignore[attr-defined]

    assert described["paths"].keys() == ANSWERS.keys()
    assert "422" not in json.dumps(described["paths"])
    assert "HTTPValidationError" not in json.dumps(described)
    for path, operations in described["paths"].items():
        for operation in operations.values():
            assert {"200", "400", "408", "431", "500", "503"} <= operation["responses"].keys(), path
            assert "401" not in operation["responses"]
            assert "security" not in operation


def test_keys_and_names_are_described_where_they_are_asked_for(tokenizer: KeuralTokenizer) -> None:
    settings: dict[str, Any] = {"keys": Keys([KEY]), "hosts": frozenset({"localhost"}), "limits": quick()}
    described = make_app(service_of(tokenizer, Writing(tokenizer, "x"), **settings))._app.openapi()  # type: ignore[attr-defined]

    for path, operations in described["paths"].items():
        for operation in operations.values():
            assert ("401" in operation["responses"]) is (path not in OPEN), path
            assert bool(operation["security"]) is (path not in OPEN), path
            assert "403" in operation["responses"], path
    assert described["components"]["schemas"]["ChatRequest"]["properties"]["model"]["anyOf"][0]["enum"] == ["tiny"]
