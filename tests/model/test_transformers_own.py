"""transformers' own tests of every model, run on ours: what its users may do with a model class (`make test-common`).

They come with the source release of transformers, whose unpacked directory KEURAL_TRANSFORMERS_SOURCE names; nothing of it is kept
here. Of the mixins that they import, the source release leaves out exports and `generate`; empty ones stand for them.
"""

import importlib
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from keural.model import KeuralConfig, KeuralMoECausalLM, KeuralMoEModel

SOURCE = os.environ.get("KEURAL_TRANSFORMERS_SOURCE")
if SOURCE is None:
    pytest.skip("KEURAL_TRANSFORMERS_SOURCE names no source release of transformers (make test-common)", allow_module_level=True)

pytestmark = pytest.mark.slow
_PACKAGE = "transformers_own_tests"
_LEFT_OUT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def _module(name: str, directory: Path | None = None) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = [str(directory)] if directory is not None else []
    sys.modules[name] = module
    return module


def _common_tests() -> types.ModuleType:
    """The module of common tests, of the release that is installed."""
    assert SOURCE is not None
    tests = Path(SOURCE) / "tests"
    stated = (Path(SOURCE) / "PKG-INFO").read_text(encoding="utf-8")
    assert f"\nVersion: {transformers.__version__}\n" in stated, f"{SOURCE} is not of transformers {transformers.__version__}"
    _module(_PACKAGE, tests)
    for name, mixin in _LEFT_OUT.items():
        package = name.partition(".")[0]
        if not (tests / package).is_dir():
            _module(f"{_PACKAGE}.{package}")
            setattr(_module(f"{_PACKAGE}.{name}"), mixin, type(mixin, (), {}))
    return importlib.import_module(f"{_PACKAGE}.test_modeling_common")


common = _common_tests()
# The tests find out by these tables which class has a loss and which is the body of which.
common.MODEL_MAPPING_NAMES["keural"] = KeuralMoEModel.__name__
common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["keural"] = KeuralMoECausalLM.__name__


class Shapes:
    """What the common tests ask of a model: a small configuration and inputs for it."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 3, 7, 32, 2, 4, 99
    is_training = True
    causal_lm_class, base_model_class = KeuralMoECausalLM, KeuralMoEModel

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> KeuralConfig:
        """Two layers, one of which slides."""
        return KeuralConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=40,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=5,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[KeuralConfig, dict[str, Any]]:
        """Ids without special ones, and a mask that hides nothing."""
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestOfTransformers(common.ModelTesterMixin, unittest.TestCase):  # type: ignore[name-defined]
    """Every common test."""

    all_model_classes = (KeuralMoEModel, KeuralMoECausalLM)
    test_all_params_have_gradient = False  # experts that get no token have none
    is_encoder_decoder = False

    def setUp(self) -> None:
        self.model_tester = Shapes(self)

    def test_generation_tester_mixin_inheritance(self) -> None:
        self.skipTest("the source release leaves the tests of `generate` out; tests/model/test_generation.py has ours")

    def test_bc_cache_name_forward(self) -> None:
        self.skipTest("`past_key_values` is the name that every supported release knows, so it is not deprecated here")
