"""`import keural` makes the architecture known to transformers, in either order, and does not import the network for it."""

import subprocess
import sys

import pytest

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


def python(code: str) -> str:
    """What a fresh interpreter prints. Fails with its traceback."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "first",
    [
        "import keural",
        "from transformers import AutoModelForCausalLM",
        "import transformers",
        "import keural; from transformers import AutoTokenizer",
        "import keural; import transformers.modeling_layers",  # imports the Auto classes before its own are there
        "import keural.model.modeling_keural",
    ],
)
def test_the_architecture_is_known_whichever_comes_first(first: str) -> None:
    python(first + KNOWN)


def test_the_package_alone_imports_neither_torch_nor_transformers() -> None:
    assert python("import keural, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))").strip() == "[]"


def test_unknown_names_are_refused_as_usual() -> None:
    import keural
    import keural.model

    for module in (keural, keural.model):
        with pytest.raises(AttributeError, match="no attribute 'KeuralGPT'"):
            module.KeuralGPT  # noqa: B018
