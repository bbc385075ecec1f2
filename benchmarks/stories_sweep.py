"""Whether generated stories make a small model speak, and what they cost: trials of the laptop recipe at equal processor time.

    OMP_NUM_THREADS=1 python -m benchmarks.stories_sweep DATA RUN [--out DIR] [--seconds 150] [--seeds 1] [--only NAME ...]

DATA is the data directory of the laptop recipe, RUN a run of it whose `pretrain-1` is finished: every trial goes on from there with
`pretrain-2` and one stage of SFT, for which the time is shared as `PRETRAINING` says, and to which generated stories of the
micro-world are added. Variants differ in the share of stories in the first and in their weight in the second. Measured are bits
per byte of RUN's held-out texts after each stage, the loss on held-out answers of all sources, stories among them, and greedy
answers to the recipe's sample prompts and to `ASKED`, all of them. Data is kept in RUN. A line per trial is kept in
DIR/trials.jsonl, and what is there already is not run again.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning_sweep import parser_of, run_trials, train_for, trainer_of
from benchmarks.speaking_sweep import bits
from benchmarks.stages_sweep import losses, some_of
from keural.data.loading.mixture import Mixture, mix
from keural.data.prepare import prepare
from keural.data.tokens.store import TokenStore
from keural.evaluate.generation import greedy
from keural.pipeline.workspace import build_config
from keural.recipe import MixingSpec, Recipe, SourceSpec, StageSpec, load_recipe
from keural.recipe.shipped import shipped
from keural.tokenizer import KeuralTokenizer, Message

START, STAGES = "pretrain-1", ("pretrain-2", "sft-1")
"""Where trials start, and the stages that they train."""
PRETRAINING = 0.54
"""Share of the time before SFT, as in the recipe."""
RATE = 1e-3
"""Of SFT, falling to 0."""
STORIES = "stories"
"""The source's name in both stages."""
COUNTS = {"prose": 4500, "instructions": 2000}
"""How many stories there are to draw from, by the part that a stage trains on."""
HELD = 60
"""How many stories of held-out content are measured."""
ASKED = (
    "Tell me a story.", "Tell me a story about a rabbit.", "Tell me a story about an owl and Jia.", "이야기 하나 해 줘.",
    "토끼 이야기 해 줘.", "곰과 여우 이야기를 들려줘.",
)  # fmt: skip
ANSWER_TOKENS = 192


@dataclass(frozen=True)
class Variant:
    """How much of each stage's tokens are stories: a share of pretraining's, a weight beside those of the other conversations."""

    share: float = 0.0
    weight: float = 0.0


VARIANTS = {
    "without": Variant(),
    "in SFT alone": Variant(weight=0.8),
    "a small share": Variant(0.05, 0.4),
    "a tenth": Variant(0.1, 0.8),
    "a fifth": Variant(0.2, 0.8),
}
"""What is tried."""


def mixture_of(stage: StageSpec, store: TokenStore, variant: Variant) -> Mixture:
    """Of pretraining every other source by its tokens, and stories by their share of all; of SFT the sources by their weights."""
    if stage.objective == "next_token":
        weights = {
            name: float(store.extent(stop - 1)[1] - store.extent(first)[0]) for name, (first, stop) in store.sections.items()
        }
        others = sum(weights.values()) - weights[STORIES]
        weights[STORIES] = others * variant.share / (1 - variant.share)
    else:
        weights = {source.name: source.weight or 1.0 for source in stage.data.sources} | {STORIES: variant.weight}
    return mix(store, {name: weight for name, weight in weights.items() if weight}, MixingSpec(max_repeat=4.0))


def source(part: str, **more: Any) -> SourceSpec:
    """Stories as documents or as conversations."""
    options = {"part": part, "count": COUNTS[part], "tasks": [STORIES], **more}
    return SourceSpec(name=f"heldout_{STORIES}" if more else STORIES, adapter="microworld", options=options)


def stages(recipe: Recipe) -> list[StageSpec]:
    """Both stages with stories; that of SFT is the only one of its kind here, so its rate falls to 0."""
    pretraining, sft = (recipe.stage(name) for name in STAGES)
    documents = [each.model_copy(update={"weight": 1.0}) for each in (*pretraining.data.sources, source("prose"))]
    prose = pretraining.data.model_copy(update={"sources": documents, "mixing": MixingSpec()})
    held = [*sft.data.heldout_sources, source("instructions", split="heldout", count=HELD)]
    told = source("instructions").model_copy(update={"weight": 1.0})
    chats = sft.data.model_copy(update={"sources": [*sft.data.sources, told], "heldout_sources": held})
    train = sft.train.model_copy(update={"lr": RATE, "min_lr": 0.0})
    return [pretraining.model_copy(update={"data": prose}), sft.model_copy(update={"data": chats, "train": train})]


def trial(name: str, data: Path, run: Path, out: Path, seed: int, seconds: float, most_bytes: int) -> dict[str, Any]:
    """Train both stages of a variant for so long and measure each."""
    recipe, tokenizer = load_recipe(shipped("laptop"), (f"data={data}",)), KeuralTokenizer.load(run / "tokenizer")
    config, weights = build_config(recipe, tokenizer), run / START / "model"
    line: dict[str, Any] = {"variant": name, "seed": seed, "seconds": seconds, "stages": []}
    for stage, share in zip(stages(recipe), (PRETRAINING, 1 - PRETRAINING), strict=True):
        prepared = prepare(stage.data, stage.objective, data, tokenizer, run / "data", recipe.spec.seed)
        store = prepared.corpus.open(tokenizer.sha256, config.vocab_size)
        assert isinstance(store, TokenStore)
        assert prepared.heldout is not None
        mixed = dataclasses.replace(prepared, mixture=mixture_of(stage, store, VARIANTS[name]))
        trainer = trainer_of(stage, mixed, config, tokenizer, run, seed, weights)
        tokens, steps = train_for(trainer, stage, seconds * share)
        trainer.policy.eval()
        measured: dict[str, Any] = {"tokens": tokens, "steps": steps, "bits": bits(recipe, trainer, tokenizer, run, most_bytes)}
        if stage.objective == "sft":
            found = losses(trainer, some_of(TokenStore.open(prepared.heldout), stage))
            measured["losses"] = {each: float(sums[:, 0].sum() / sums[:, 1].sum()) for each, sums in found.items()}
            prompts = [*recipe.spec.chat.samples, *ASKED]
            answers = greedy(trainer.policy.model, tokenizer, [[Message("user", each)] for each in prompts], ANSWER_TOKENS)
            measured["samples"] = dict(zip(prompts, answers, strict=True))
        line["stages"].append(measured)
        weights = out / name.replace(" ", "-") / str(seed) / stage.name
        trainer.policy.model.save_pretrained(weights)
    return line


def rows(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A column per trial: bits per byte after each stage, losses by source; below it all answers."""
    head = ["", *(f"{line['variant']}, seed {line['seed']}" for line in lines)]
    table = [head, ["---"] * len(head)]
    for place, stage in enumerate(STAGES):
        table.append([f"steps, {stage}", *(str(line["stages"][place]["steps"]) for line in lines)])
        for text in lines[0]["stages"][place]["bits"]:
            table.append([f"bits, {text}, after {stage}", *(f"{line['stages'][place]['bits'][text]:.3f}" for line in lines)])
    for name in lines[0]["stages"][-1]["losses"]:
        table.append([name, *(f"{line['stages'][-1]['losses'][name]:.3f}" for line in lines)])
    found = [f"| {' | '.join(row)} |" for row in table]
    for line in lines:
        answers = "\n".join(f"- {asked} → {answer!r}" for asked, answer in line["stages"][-1]["samples"].items())
        found.append(f"\n**{line['variant']}, seed {line['seed']}**\n\n{answers}")
    return found


def main() -> None:
    """Run the trials that are asked for and print the table of all that there are."""
    parser = parser_of(__doc__, list(VARIANTS), "runs/stories-sweep", 150.0, 15_000)
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()

    def run(name: str, seed: int) -> dict[str, Any]:
        return trial(name, arguments.data, arguments.run, arguments.out, seed, arguments.seconds, arguments.bytes)

    lines = run_trials(arguments, run)
    if lines:
        print("\n".join(rows(lines)))


if __name__ == "__main__":
    main()
