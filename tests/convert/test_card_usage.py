"""The usage code of the published model card, run as it is printed, on a model directory that this package writes.

The code is read from the card; only the name on the hub is replaced by the directory's path. It runs in a process that cannot
import this package: with the suite's interpreter, and with each of those that KEURAL_CLEAN_PYTHONS lists, separated by spaces.
`make test-transformers` makes such environments: torch, one release of transformers, and accelerate, which transformers asks for
when it reads the card's `device_map="auto"`.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.directory import save_model_directory
from keural.tokenizer import KeuralTokenizer, Message, render_prompt
from keural.tokenizer.chatml import Rendered, render

HUB_NAME = "mkd-hossain/keural-sft3-final"
IM_END = 131_073
MAX_NEW_TOKENS = 256
ANSWER = "안녕하세요! 오늘은 맑고 따뜻해요. It is sunny."

UNSET = pytest.mark.skip(reason="KEURAL_CLEAN_PYTHONS lists no interpreters; `make test-transformers` does")
CLEAN_PYTHONS = [
    pytest.param(python, id=Path(python).parents[1].name) for python in os.environ.get("KEURAL_CLEAN_PYTHONS", "").split()
] or [pytest.param("", marks=UNSET, id="clean")]

RUN = """
import importlib.util, json, sys
installed = [name for name in ("keural", "sentencepiece") if importlib.util.find_spec(name)]
sys.modules["keural"] = None  # importing it fails from here on, however it is installed
usage, report = sys.argv[1:]
card = {"__name__": "__main__"}
exec(compile(open(usage, encoding="utf-8").read(), usage, "exec"), card)
prompt, (output,) = card["inputs"]["input_ids"][0].tolist(), card["outputs"].tolist()
json.dump({
    "installed": installed, "class": type(card["model"]).__name__, "module": type(card["model"]).__module__,
    "dtype": str(card["model"].dtype), "prompt": prompt, "output": output,
}, open(report, "w"))
"""


class Run(NamedTuple):
    """What one run of the card's code printed and left behind."""

    report: dict[str, Any]
    stdout: str
    stderr: str


def card_usage(shared: Path) -> str:
    """The code under "Usage" in the published card."""
    card = (shared / "reference" / "keural-sft3-final-card.txt").read_text(encoding="utf-8")
    return card.split("\nUsage\n")[1].split("\nNext Model\n")[0].strip() + "\n"


def card_messages(usage: str) -> list[Message]:
    """The conversation that the card's code asks about; its Korean is garbled in the stored card, which is no matter here."""
    assignments = [node for node in ast.parse(usage).body if isinstance(node, ast.Assign)]
    (messages,) = (node.value for node in assignments if ast.unparse(node.targets[0]) == "messages")
    return [Message(**message) for message in ast.literal_eval(messages)]


def model_that_answers(conversation: Rendered) -> KeuralMoECausalLM:
    """A tiny model with the published vocabulary, fitted to the trained part of one conversation until it is certain of it.

    Certain means that sampling as the card does leaves no other choice, and so that generation ends where the answer ends.
    """
    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_hidden_layers": 2}
    model = KeuralMoECausalLM(KeuralConfig(hidden_size=32, intermediate_size=16, initializer_range=0.1, sliding_window=17, **shape))
    ids = torch.tensor(conversation.ids)
    before_answer = torch.tensor(conversation.mask).nonzero().squeeze(1) - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        logits = model(ids.unsqueeze(0), logits_to_keep=before_answer).logits[0]
        loss = F.cross_entropy(logits, ids[before_answer + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    return model.to(torch.bfloat16)


@pytest.fixture(scope="module")
def published_tokenizer(published_tokenizer_file: Path) -> KeuralTokenizer:
    return KeuralTokenizer.load(published_tokenizer_file)


@pytest.fixture(scope="module")
def usage(shared: Path) -> str:
    return card_usage(shared)


@pytest.fixture(scope="module")
def answering_dir(usage: str, published_tokenizer: KeuralTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a model that answers the card's question with `ANSWER`, in several shards."""
    model = model_that_answers(render(published_tokenizer, [*card_messages(usage), Message("assistant", ANSWER)]))
    out = tmp_path_factory.mktemp("card") / "model"
    return save_model_directory(out, model.config, model.state_dict(), published_tokenizer, {}, shard_bytes=20_000)


@pytest.fixture(scope="module", params=[pytest.param(sys.executable, id="suite"), *CLEAN_PYTHONS])
def run(request: pytest.FixtureRequest, usage: str, answering_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The card's code in an empty directory of an offline process, with no one to answer a prompt."""
    assert usage.count(HUB_NAME) == 2
    work = tmp_path_factory.mktemp("usage")
    (work / "empty").mkdir()
    (work / "usage.py").write_text(usage.replace(HUB_NAME, str(answering_dir)), encoding="utf-8")
    done = subprocess.run(
        [request.param, "-I", "-c", RUN, str(work / "usage.py"), str(work / "report.json")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "HF_HOME": str(work / "cache"), "HF_HUB_OFFLINE": "1"},
        cwd=work / "empty",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(json.loads((work / "report.json").read_text()), done.stdout, done.stderr)


def test_the_directorys_own_code_is_loaded_in_the_cards_precision(run: Run) -> None:
    assert run.report["class"] == "KeuralMoECausalLM"
    assert run.report["module"].startswith("transformers_modules.")
    assert run.report["dtype"] == "torch.bfloat16"


def test_the_chat_template_gives_the_ids_of_our_prompt(run: Run, usage: str, published_tokenizer: KeuralTokenizer) -> None:
    assert run.report["prompt"] == render_prompt(published_tokenizer, card_messages(usage))


def test_generation_stops_at_im_end(run: Run) -> None:
    new = run.report["output"][len(run.report["prompt"]) :]
    assert new.index(IM_END) == len(new) - 1
    assert len(new) < MAX_NEW_TOKENS


def test_the_answer_is_printed_without_special_tokens(run: Run) -> None:
    assert run.stdout == ANSWER + "\n"


def test_transformers_complains_of_nothing_but_a_name_in_the_cards_own_code(run: Run) -> None:
    complaints = [line for line in run.stderr.splitlines() if line.startswith("[transformers]")]
    assert [line for line in complaints if "`torch_dtype` is deprecated" not in line] == []


@pytest.mark.parametrize("run", CLEAN_PYTHONS, indirect=True)
def test_clean_environments_have_neither_this_package_nor_sentencepiece(run: Run) -> None:
    assert run.report["installed"] == []
