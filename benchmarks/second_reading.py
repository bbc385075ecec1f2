"""What the second stage of pretraining gains when it reads on instead of beginning again where the first one began.

    OMP_NUM_THREADS=1 python benchmarks/second_reading.py DATA RUN OUT [--seeds 42 7] [--tokens 204800]

DATA is the data directory of the laptop recipe, RUN a run of it whose `pretrain-1` is finished and was given the recipe's seed.
`pretrain-2` is trained from there on so many tokens, once for every seed of the order: with RUN's own it reads what pretrain-1 has
read, in the same order. Measured are bits per byte of RUN's held-out texts; the model is left in OUT/SEED.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.learning_sweep import trainer_of
from benchmarks.speaking_sweep import bits
from benchmarks.stages_sweep import train_tokens
from keural.data.prepared import find_by_settings
from keural.pipeline.workspace import build_config
from keural.recipe import load_recipe
from keural.recipe.shipped import shipped
from keural.tokenizer import KeuralTokenizer


def main() -> None:
    """Train the second stage once for every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 7])
    parser.add_argument("--tokens", type=int, default=204_800, help="of the stage")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = arguments.run
    recipe, tokenizer = load_recipe(shipped("laptop"), (f"data={arguments.data}",)), KeuralTokenizer.load(run / "tokenizer")
    stage = recipe.stage("pretrain-2")
    prepared = find_by_settings(stage.data, stage.objective, tokenizer, run / "data", recipe.spec.seed)
    assert prepared is not None
    tokens = arguments.tokens
    for seed in arguments.seeds:
        start = run / "pretrain-1" / "model"
        trainer = trainer_of(stage, prepared, build_config(recipe, tokenizer), tokenizer, run, seed, start)
        train_tokens(trainer, stage, tokens)
        trainer.policy.eval()
        trainer.policy.model.save_pretrained(arguments.out / str(seed))
        print(json.dumps({"seed": seed, "tokens": tokens, "bits": bits(recipe, trainer, tokenizer, run, 100_000)}), flush=True)


if __name__ == "__main__":
    main()
