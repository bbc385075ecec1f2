"""Whether a stage's settings and the model that it starts from belong together.

In: a model directory, the configuration and the tokenizer of a recipe. Out: lines about what could not be compared, or a refusal
that names everything that differs. Weights fit any settings of their shape: with another activation, other windows or another
tokenizer of the same size training starts, its loss is that of noise or a little worse than it should be, and nothing says so. So
every field that changes the network is compared (`keural.model.config_fields`), and the tokenizer by its content.
"""

from collections.abc import Collection
from pathlib import Path

from keural.errors import UserError
from keural.files import read_text, sha256_file
from keural.model import CHATML_IDS, KeuralConfig
from keural.model.config_fields import differences, foreign_ids, shown
from keural.pretrained.directory import read_config
from keural.pretrained.lineage import read_record
from keural.recipe import ModelSpec
from keural.tokenizer.model_file import BOS_ID, EOS_ID, IM_END, IM_START, PAD_ID

CHAT_TEMPLATE = "chat_template.jinja"
_TOKENIZER_FILE = "tokenizer.model"
_THETA = "rope_theta"


def check_agreement(directory: Path, wanted: KeuralConfig, tokenizer_sha: str, *, chats: bool) -> list[str]:
    """Compare the model in `directory` with what a stage trains; says what could not be compared.

    A model from before the two ChatML ids, which gets rows for them, may have so many ids fewer.

    Args:
        directory: a model directory.
        wanted: the recipe's network with the ids of its tokenizer.
        tokenizer_sha: SHA-256 of the recipe's `tokenizer.model`.
        chats: whether the stage trains conversations or pairs, which are written in ChatML.

    Returns:
        Lines for the user.

    Raises:
        UserError: when anything differs, naming each field with both values; when the directory is no model directory.
    """
    stored = read_config(directory)
    grows = stored.vocab_size == wanted.vocab_size - CHATML_IDS
    fields = differences(stored, wanted, ("vocab_size",) if grows else ())
    told = [f"{name} is {there} there and {here} in the recipe" for name, there, here in fields]
    told += foreign_ids(stored, PAD_ID, BOS_ID, {EOS_ID, stored.vocab_size - 1, wanted.vocab_size - 1})
    tokenizer = tokenizer_of(directory)
    other = tokenizer not in (None, tokenizer_sha)
    if other:
        told.append(f"its tokenizer (SHA-256 {str(tokenizer)[:12]}…) is not the recipe's ({tokenizer_sha[:12]}…)")
    if told:
        settings = _settings(stored, [field.name for field in fields])
        if settings is not None and other and (directory / _TOKENIZER_FILE).is_file():
            settings.append(f"tokenizer.path={(directory / _TOKENIZER_FILE).absolute()}")
        alternative = f", or set {' '.join(settings)}" if settings else ""
        raise UserError(
            f"{directory}: does not fit the recipe: {'; '.join(told)}; start from a model of the recipe's network and tokenizer"
            f"{alternative}"
        )
    if chats:
        _check_template(directory)
    unknown = f"{directory}: has no tokenizer, so whether its ids are those of the recipe's tokenizer could not be checked"
    return [unknown] if tokenizer is None else []


def _settings(stored: KeuralConfig, names: Collection[str]) -> list[str] | None:
    """The settings of a recipe whose network is the stored one in these fields; None where a recipe has no key for one of them."""
    found = []
    for name in names:
        if name == "rope_parameters" and stored.rope_parameters["rope_type"] == "default":
            found.append(f"model.{_THETA}={stored.rope_parameters[_THETA]}")
        elif name in ModelSpec.model_fields and getattr(stored, name) is not None:
            found.append(f"model.{name}={shown(stored, name)}")
        elif name != "vocab_size":  # which is the tokenizer's
            return None
    return found


def tokenizer_of(directory: Path) -> str | None:
    """SHA-256 of the tokenizer that a model directory holds, or that its record names; None where there is neither.

    Raises `UserError` when the two disagree.
    """
    stated: str | None = read_record(directory).get("tokenizer_sha256")
    file = directory / _TOKENIZER_FILE
    if not file.is_file():
        return stated
    found = sha256_file(file)
    if stated not in (None, found):
        raise UserError(f"{file}: is not the tokenizer that keural.json names; copy or export {directory} again")
    return found


def _check_template(directory: Path) -> None:
    """Raise `UserError` when the directory's chat template writes no ChatML. It is looked at for two words, and never rendered."""
    file = directory / CHAT_TEMPLATE
    if not file.is_file():
        return
    text = read_text(file)
    if missing := [word for word in (IM_START, IM_END) if word not in text]:
        raise UserError(
            f"{file}: writes chats in another format (there is no {missing[0]} in it), and the stage trains ChatML; start from a "
            "model that was taught no other format, or import it again without this file to teach it ChatML nonetheless"
        )
