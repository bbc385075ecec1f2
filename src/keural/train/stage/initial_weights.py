"""The weights a stage starts from: drawn from the seed, or read from a model directory; float32 in either case."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch

from keural.model import CHATML_IDS, KeuralConfig, KeuralMoECausalLM, grow_vocabulary
from keural.pretrained.agreement import check_agreement
from keural.pretrained.stored_model import build, open_network
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
    config = copy.deepcopy(config)
    config._experts_implementation = experts_implementation(device, compiled)
    if directory is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return KeuralMoECausalLM(config)
    stored, wanted = open_network(directory), config.vocab_size
    lines = check_agreement(stored.directory, config, tokenizer_sha, chats=chats)
    for line in filter(None, (stored.notice, *lines)):
        say(line)
    if stored.config.vocab_size == wanted - CHATML_IDS:
        config.vocab_size = stored.config.vocab_size
    model = build(stored, torch.float32, config)
    grow_vocabulary(model, wanted)
    return model
