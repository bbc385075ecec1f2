"""`import keural` makes the architecture known to transformers, in either order, and does not import the network for it."""

from pathlib import Path

import pytest

from tests.helpers.forks import Ended, Job, run_in_forks

KNOWN = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
import keural
assert CONFIG_MAPPING["keural"] is keural.KeuralConfig
assert MODEL_FOR_CAUSAL_LM_MAPPING[keural.KeuralConfig] is keural.KeuralMoECausalLM
assert MODEL_MAPPING[keural.KeuralConfig] is keural.KeuralMoEModel
assert isinstance(AutoConfig.for_model("keural"), keural.KeuralConfig)
assert not any(type(finder).__module__.startswith("keural") for finder in sys.meta_path), "the watch stayed"
"""


FIRST = [
    "import keural",
    "from transformers import AutoModelForCausalLM",
    "import transformers",
    "import keural; from transformers import AutoTokenizer",
    "import keural; import transformers.modeling_layers",  # imports the Auto classes before its own are there
    "import keural.model.modeling_keural",
]
OTHERS = """
import sys
import huggingface_hub, jinja2, torch, torch._dynamo, torch.distributed.tensor
assert not {"keural", "transformers"} & set(sys.modules)
"""
ALONE = "import keural, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """How the orders ended, each in an interpreter of its own that has what both packages import of others."""
    jobs = {}
    for number, first in enumerate(FIRST):
        place = tmp_path_factory.mktemp("order") / str(number)
        place.mkdir()
        jobs[first] = Job(first + KNOWN, place)
    return run_in_forks(OTHERS, jobs)


@pytest.mark.parametrize("first", FIRST)
def test_the_architecture_is_known_whichever_comes_first(ended: dict[str, Ended], first: str) -> None:
    assert ended[first].code == 0, ended[first].error


def test_the_package_alone_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert run_in_forks("", {"alone": Job(ALONE, tmp_path / "here")})["alone"] == Ended(0, "[]\n", "")


def test_unknown_names_are_refused_as_usual() -> None:
    import keural
    import keural.model

    for module in (keural, keural.model):
        with pytest.raises(AttributeError, match="no attribute 'KeuralGPT'"):
            module.KeuralGPT  # noqa: B018
