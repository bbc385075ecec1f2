"""`keural init --from-dense`: a dense Llama-shaped model becomes the start of a mixture of experts ("sparse upcycling").

In: a directory with a Llama, Mistral or Qwen model in safetensors, and a recipe's network. Out: a model directory of the recipe in
which every expert is the dense model's feed-forward network and every router is drawn at random. A token's router weights add up to
one, so whichever experts it is sent to, their mixture is what the dense network computed: the logits are the dense model's
(Komatsuzaki et al. 2023, arXiv 2212.05055).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from keural import terminal
from keural.convert.dense_model import DenseModel, open_dense, problems
from keural.convert.initialise import random_weights
from keural.errors import UserError
from keural.files import check_new, read_object, sha256_file
from keural.model import CHATML_IDS, KeuralConfig, with_mean_rows
from keural.parsing import parse_json
from keural.pretrained.directory import write_model_directory
from keural.pretrained.lineage import UNKNOWN
from keural.pretrained.tensor_names import EMBEDDING
from keural.pretrained.weights import TensorInfo, Weights, finite
from keural.recipe import ChatSpec
from keural.tokenizer import KeuralTokenizer
from keural.tokenizer.convert import to_tokenizers

TOKENIZER_MODEL, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
_DECIDING = ("normalizer", "pre_tokenizer", "model")
"""Parts of `tokenizer.json` that decide which ids a text has."""

Say = Callable[[str], None]


def upcycle(
    source: Path,
    out: Path,
    config: KeuralConfig,
    tokenizer: KeuralTokenizer,
    *,
    recipe: str,
    chat: ChatSpec,
    seed: int,
    dtype: torch.dtype | None = None,
    named_tokenizer: bool = False,
    say: Say = terminal.say,
    advance: Callable[[int], None] = lambda count: None,
) -> Path:
    """Write the mixture of experts whose experts are the dense model in `source`; at most one tensor is in memory.

    Args:
        source: directory of the dense model: `config.json` and safetensors.
        out: must not exist, or be empty.
        config: the recipe's network.
        tokenizer: the recipe's. A dense model from before the two ChatML ids gets rows for them, at the mean of the others.
        recipe: its name, for the lineage.
        chat: the recipe's defaults.
        seed: of the routers, each drawn from N(0, initializer_range²) as in `initialise`.
        dtype: what is stored; None keeps the dense model's.
        named_tokenizer: the user named the tokenizer, so that a directory without one is believed to be its model.
        say: told, line by line, what was read and how it was understood.
        advance: told the bytes of every tensor that was written.

    Returns:
        `out`.

    Raises:
        UserError: with all that the recipe's network cannot be or is not; when the tokenizers differ, tensors are missing, left
            over, of another shape or not finite, there is too little disk, or `out` is not empty. Nothing is left behind.
    """
    check_new(out)
    dense = open_dense(source)
    found, ids = problems(dense, config), dense.integer("vocab_size")
    grows = ids == tokenizer.vocab_size - CHATML_IDS
    if not grows and ids != tokenizer.vocab_size:
        found.append(f"it has {ids:,} ids and the recipe's tokenizer {tokenizer.vocab_size:,}")
    if found:
        raise UserError(f"{source}: cannot become the recipe's network: {'; '.join(found)}")
    say(f"checksums: {dense.checkpoint.verified or 'none came with it: nothing was verified'}")
    _check_tokenizer(source, tokenizer, named_tokenizer, say)
    weights = _weights(dense, config, seed, dtype, grows)
    check_new(out, weights.nbytes)
    _say_context(dense, config, say)
    if grows:
        say(f"vocabulary: {ids:,} ids and {CHATML_IDS} new rows at their mean")
    lineage = {
        "recipe": recipe,
        "stage": "upcycled",
        "seed": seed,
        "source": {"file": source.name},
        "chain": [f"upcycled {source.name}"],
        "objectives": ["next_token"] if grows else [UNKNOWN],
    }
    write_model_directory(out, config, weights.watched(advance), tokenizer, lineage, chat)
    say(f"{out}: {config.num_local_experts} experts a layer, each the dense network; {weights.nbytes / 1e9:.2f} GB")
    return out


def _check_tokenizer(source: Path, tokenizer: KeuralTokenizer, named: bool, say: Say) -> None:
    """Raise `UserError` unless the dense model was trained with the recipe's tokenizer, as far as its files say.

    `named` tells that the user gave the tokenizer, who is believed where the directory has none.
    """
    model, table = source / TOKENIZER_MODEL, source / TOKENIZER_JSON
    remedy = "start from a model of the recipe's tokenizer, or give its own with --tokenizer"
    if model.is_file():
        if (found := sha256_file(model)) != tokenizer.sha256:
            raise UserError(
                f"{model}: is not the recipe's tokenizer (SHA-256 {found[:12]}… instead of {tokenizer.sha256[:12]}…); {remedy}"
            )
    elif table.is_file():
        ours = to_tokenizers(tokenizer.proto, tokenizer.kind)
        if _deciding(table) != _parts(ours):
            raise UserError(f"{table}: is not the recipe's tokenizer: it gives texts other ids; {remedy}")
    elif named:
        say(f"tokenizer: {source} has none to compare; the one that was given is taken for its own")
    else:
        raise UserError(
            f"{source}: no {TOKENIZER_MODEL} or {TOKENIZER_JSON}, so what its ids mean is not known; give its own with --tokenizer"
        )


def _deciding(table: Path) -> dict[str, Any]:
    """The parts of a `tokenizer.json` that decide. Raises `UserError` when it cannot be read."""
    read_object(table)
    try:
        return _parts(Tokenizer.from_file(str(table)))
    except Exception as error:  # the library has no kind of its own for a file that it cannot use
        raise UserError(f"{table}: no tokenizer ({str(error).splitlines()[0]})") from error


def _parts(tokenizer: Tokenizer) -> dict[str, Any]:
    values = parse_json(tokenizer.to_str())
    return {name: values[name] for name in _DECIDING}


def _weights(dense: DenseModel, config: KeuralConfig, seed: int, dtype: torch.dtype | None, grows: bool) -> Weights:
    """The mixture's tensors: experts and the rest of the dense model, routers of their own."""
    kept = dtype or dense.weights.infos[EMBEDDING].dtype
    drawn = random_weights(config, seed, kept)
    read_dense = finite(dense.directory, dense.weights).read

    def read(name: str) -> Tensor:
        if name.endswith(".mlp.gate.weight"):
            return drawn.read(name)
        tensor = read_dense(_source(name)).to(kept)
        return with_mean_rows(tensor, CHATML_IDS) if grows and name == EMBEDDING else tensor

    return replace(drawn, infos={name: TensorInfo(info.shape, kept) for name, info in drawn.infos.items()}, read=read)


def _source(name: str) -> str:
    """The dense model's name of a tensor: `mlp.experts.3.up_proj` is `mlp.up_proj`."""
    block, experts, rest = name.partition(".experts.")
    return f"{block}.{rest.partition('.')[2]}" if experts else name


def _say_context(dense: DenseModel, config: KeuralConfig, say: Say) -> None:
    trained = dense.values.get("max_position_embeddings")
    wanted = config.max_position_embeddings
    if isinstance(trained, int) and trained < wanted:
        say(f"context: {trained:,} tokens there, {wanted:,} in the recipe: longer texts are new to the model")
