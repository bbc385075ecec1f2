"""Proof, when a model is opened to generate, that it remembers what it has read.

In: a loaded model and its directory. Out: nothing, or a refusal. Generating reads a prompt once and then one token at a time beside
the key-value cache. Where another release of transformers or torch than those tested handles that cache in another way, nothing
fails and the text is wrong; so there, and where the directory's code is not this package's, the logits of two cached steps are
compared with those of reading the same few tokens at once. That is four forward passes over at most eight tokens, once for each
(releases, code, device, precision): what was proved is kept in the user's cache directory.
"""

import contextlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from keural.errors import UserError
from keural.files import fingerprint, write_json
from keural.model import KeuralMoECausalLM
from keural.pretrained.network_code import has_other_code, package_code
from keural.releases import TESTED, installed_release, outside_tested

TOKENS, STEPS, TRIES = 8, 2, 3
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Largest difference, as a share of the logits' own spread, by the precision of the weights."""
HALF_TOLERANCE = 0.1
"""For the shorter formats, where rounding can also send a token to another expert."""


def check_cached_step(model: KeuralMoECausalLM, directory: Path) -> None:
    """Prove that cached steps of `model`, placed where it will run, equal recomputation, if there is a reason to doubt it.

    Reasons are releases outside those tested and a directory with other code. Raises `UserError`, which names the reason, when
    they do not.
    """
    doubts = outside_tested()
    if has_other_code(directory):
        doubts.append("the directory's network code is not this package's")
    if not doubts:
        return
    claim = _claim(model)
    if _is_remembered(claim):
        return
    failure = _failure(model)
    if failure is not None:
        releases = " ".join(f"{library}=={tested[-1]}" for library, tested in TESTED.items())
        raise UserError(
            f"{directory}: the model would generate wrong text here: {failure}. {'; '.join(doubts)}. Install what is tested "
            f"(pip install {releases}) or a newer version of this package"
        )
    _remember(claim)


def _failure(model: KeuralMoECausalLM) -> str | None:
    """What is wrong with cached steps; None when nothing is. Rounding may spoil one try, a lost cache spoils all."""
    tolerance = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    smallest = float("inf")
    for number in range(TRIES):
        try:
            difference = cached_step_difference(model, number)
        except Exception as error:  # whatever another release makes of our calls
            return f"its forward pass fails ({' '.join(str(error).split())[:300] or type(error).__name__})"
        if difference is None:
            return None
        smallest = min(smallest, difference)
        if smallest <= tolerance:
            return None
    return f"a step beside the cache and reading everything again differ by {smallest:.0%} of the logits' spread"


@torch.inference_mode()
def cached_step_difference(model: KeuralMoECausalLM, number: int = 0) -> float | None:
    """How far the logits of `STEPS` cached steps are from those of one pass over all `TOKENS`, relative to the latter's spread.

    The tokens are spread over the vocabulary; each `number` gives others. None where the logits are not finite: that is damage of
    another kind, which generating notices.
    """
    vocab_size = model.config.vocab_size
    ids = ((torch.arange(1, TOKENS + 1) * (vocab_size // (TOKENS + 2)) + 1 + number) % vocab_size).unsqueeze(0).to(model.device)
    expected = model(input_ids=ids, use_cache=False, logits_to_keep=STEPS).logits[0].double()
    if not torch.isfinite(expected).all():
        return None
    cache = model(input_ids=ids[:, :-STEPS], use_cache=True, logits_to_keep=1).past_key_values
    masks = [None, dict.fromkeys(model.config.layer_types)]  # made by transformers, and left out as the engine does
    steps: list[Tensor] = []
    for token, mask in zip(ids[:, -STEPS:].split(1, dim=1), masks, strict=True):
        output = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
        steps.append(output.logits[0, -1].double())
    found = torch.stack(steps)
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((found - expected).norm(dim=-1) / spread).max())


def _claim(model: KeuralMoECausalLM) -> dict[str, str]:
    """What a proof holds for."""
    device = model.device
    return {
        **{library: installed_release(library) for library in TESTED},
        "code": package_code(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type),
        "dtype": str(model.dtype),
        "attention": str(model.config._attn_implementation),
        "experts": str(model.config._experts_implementation),
    }


def _file(claim: dict[str, str]) -> Path:
    """Where a proof is kept. Raises `OSError` or `RuntimeError` where there is no place."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return home / "keural" / "cached-step" / f"{fingerprint(claim)[:32]}.json"


def _is_remembered(claim: dict[str, str]) -> bool:
    """Whether this very claim was proved before; what cannot be read or says anything else was not."""
    try:
        return bool(json.loads(_file(claim).read_text(encoding="utf-8")) == claim)
    except (OSError, RuntimeError, ValueError, RecursionError):
        return False


def _remember(claim: dict[str, str]) -> None:
    """Keep a proof, where there is a place for it; only success is kept, since what failed may have been mended."""
    with contextlib.suppress(OSError, RuntimeError, UserError):
        write_json(_file(claim), claim)
