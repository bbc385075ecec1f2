"""The weights a stage starts from: drawn from the seed, or read from a model directory; float32 in either case, whole on one
process, and on several in parts (`parts`).
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch

from keural.model import CHATML_IDS, KeuralConfig, KeuralMoECausalLM, grow_vocabulary
from keural.pretrained.agreement import check_agreement
from keural.pretrained.stored_model import StoredNetwork, build, open_network
from keural.train.initial.parts import Parts, Share, drawn_parts, read_parts
from keural.train.processes.parallel import experts_implementation


def initial_model(
    config: KeuralConfig,
    directory: Path | None,
    seed: int,
    device: torch.device,
    compiled: bool,
    tokenizer_sha: str,
    *,
    chats: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> KeuralMoECausalLM:
    """A float32 model on the CPU, ready to train on `device`.

    Random weights depend on `seed` alone, not on the number of ranks. A model from before the two ChatML ids gets rows for them, at
    the mean of the others. `say` is told when not all of `directory` could be verified or compared. Raises `UserError` when it
    holds a model of another network or tokenizer (`check_agreement`, also for `tokenizer_sha` and `chats`), or as `open_network`
    does.
    """
    config, wanted = _configured(config, device, compiled), config.vocab_size
    if directory is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return KeuralMoECausalLM(config)
    stored = _agreeing(directory, config, tokenizer_sha, chats, say)
    if stored.config.vocab_size == wanted - CHATML_IDS:
        config.vocab_size = stored.config.vocab_size
    model = build(stored, torch.float32, config)
    grow_vocabulary(model, wanted)
    return model


def initial_parts(
    config: KeuralConfig,
    directory: Path | None,
    seed: int,
    device: torch.device,
    compiled: bool,
    tokenizer_sha: str,
    share: Share,
    *,
    chats: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[KeuralMoECausalLM, Parts]:
    """The same network without memory, and this share of its weights, bit for bit; other arguments and errors are those of
    `initial_model`.
    """
    config = _configured(config, device, compiled)
    if directory is None:
        return drawn_parts(config, seed, share)
    return read_parts(_agreeing(directory, config, tokenizer_sha, chats, say), config, share)


def _configured(config: KeuralConfig, device: torch.device, compiled: bool) -> KeuralConfig:
    config = copy.deepcopy(config)
    config._experts_implementation = experts_implementation(device, compiled)
    return config


def _agreeing(directory: Path, config: KeuralConfig, tokenizer_sha: str, chats: bool, say: Callable[[str], None]) -> StoredNetwork:
    """The model in a directory, which a stage of `config` can start from."""
    stored = open_network(directory)
    lines = check_agreement(stored.directory, config, tokenizer_sha, chats=chats)
    for line in filter(None, (stored.notice, *lines)):
        say(line)
    return stored
