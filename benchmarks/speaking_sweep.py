"""What makes a small model speak, and what that costs: trials of the laptop recipe's first SFT stage at equal processor time.

    OMP_NUM_THREADS=1 python benchmarks/speaking_sweep.py DATA RUN [--out DIR] [--seconds 40] [--seeds 1] [--only NAME ...]

DATA is the data directory of the laptop recipe, RUN a run of it whose pretraining is finished: every trial starts from its
`pretrain-2`. Measured are bits per byte of the held-out texts that RUN has, the loss on held-out answers of every source that any
trial trains on, and greedy answers to the recipe's sample prompts, all of them. A line per trial is kept in DIR/trials.jsonl, and
what is there already is not run again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning_sweep import cut, parser_of, run_trials, train_for, trainer_of
from keural.data.loading.stream import Stream
from keural.data.prepare import prepare
from keural.data.prepared import find_by_settings
from keural.evaluate.heldout_text import measured_texts
from keural.evaluate.measures import bits_per_byte
from keural.evaluate.scorecard import sample_answers
from keural.pipeline.workspace import build_config
from keural.recipe import MixingSpec, Recipe, SourceSpec, StageSpec, load_recipe
from keural.recipe.shipped import shipped
from keural.tokenizer import KeuralTokenizer
from keural.train.stage.building import stream_of
from keural.train.stage.heldout import evaluate
from keural.train.stage.job import StageJob
from keural.train.trainer import Trainer

PRETRAINED, STAGE = "pretrain-2", "sft-1"
HELD_OUT = 15
"""Per mille of every source."""


@dataclass(frozen=True)
class Variant:
    """Settings of the stage, those of the variant that it changes first; `sources` are all the conversations that it trains on."""

    changes: str | None
    settings: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    weights: dict[str, float] | None = None
    """Of the sources, and of all passages together (`again`); none: every conversation once in an epoch, and no passages."""


def qa(
    name: str, path: str, question: Any, answer: Any, language: str, *, file_format: str | None = None, **more: Any
) -> SourceSpec:
    """A source of questions and answers; `more` are settings of the source, `options` among them."""
    options = {"question": question, "answer": answer, **more.pop("options", {})}
    return SourceSpec(name=name, adapter="qa", path=path, format=file_format, language=language, options=options, **more)


SOURCES = {
    source.name: source
    for source in (
        qa("ko_chatbot", "inst_ko_chatbot/ChatbotData.csv", "Q", "A", "ko"),
        qa("ko_chatbot_3000", "inst_ko_chatbot/ChatbotData.csv", "Q", "A", "ko", limit=3000),
        SourceSpec(name="ko_xpersona", adapter="dialogue", path="inst_ko_xpersona/*valid*.json", language="ko"),
        qa(
            "ko_sae4k", "inst_ko_sae4k/sae4k_v1.txt", 0, 1, "ko", file_format="tsv",
            options={"header": False, "template": "핵심 요청만 말해 줘: {question}"},
        ),
        SourceSpec(
            name="en_gpteacher", adapter="alpaca", path="inst_en_gpteacher/*.json", language="en", options={"output": "response"},
            max_drop=0.6,
        ),
        qa("en_chatterbot", "inst_multi_chatterbot/english/[!ct]*.yml", 0, 1, "en", options={"rows": "conversations"}),
        qa("ko_chatterbot", "inst_multi_chatterbot/korean/*.yml", 0, 1, "ko", options={"rows": "conversations"}),
        qa("en_polite", "pref_rasbt_1100/*.json", "instruction", "output", "en"),
        qa("en_gsm8k", "inst_en_gsm8k_train/train.jsonl", "question", "answer", "en"),
    )
}  # fmt: skip
"""What trials train on, of conversations."""


def passages(recipe: Recipe) -> dict[str, SourceSpec]:
    """What pretraining read, as passages."""
    found = {}
    for source in recipe.stage(PRETRAINED).data.sources:
        prompt = "글을 한 단락 써 줘." if source.language == "ko" else "Write a passage of a text."
        options = {**source.options, "prompt": prompt, "characters": 500 if source.language == "ko" else 900}
        options |= {"read_as": source.adapter} if source.adapter != "text" else {}
        update = {"adapter": "passage", "options": options, "name": f"{source.name}_again", "gates": {"language": "skip"}}
        found[f"{source.name}_again"] = SourceSpec.model_validate(source.model_dump(exclude_unset=True) | update)
    return found


CHAT = ("ko_chatbot", "ko_xpersona", "en_gpteacher")
SHORT = ("ko_chatbot", "ko_chatterbot", "en_chatterbot", "en_polite")
WEIGHTS = {"ko_chatbot": 1.0, "ko_chatterbot": 0.1, "en_chatterbot": 0.15, "en_polite": 0.3}
VARIANTS: dict[str, Variant] = {
    "before": Variant(
        None, ("train.optimizer=adamw", "train.lr=2e-3", "train.min_lr=2e-4", "train.betas=[0.9, 0.95]"), sources=CHAT
    ),
    "lr 5e-4": Variant("before", ("train.lr=5e-4", "train.min_lr=0.0")),
    "muon 4e-3": Variant("before", ("train.optimizer=muon", "train.lr=4e-3", "train.min_lr=0.0", "train.betas=[0.9, 0.98]")),
    "muon 2e-3": Variant("muon 4e-3", ("train.lr=2e-3",)),
    "muon 1e-3": Variant("muon 4e-3", ("train.lr=1e-3",)),
    "short answers": Variant("muon 2e-3", sources=SHORT),
    "short answers, 4e-3": Variant("muon 4e-3", sources=SHORT),
    "all turns": Variant("short answers", ("data.train_on=all",)),
    "replay": Variant("short answers", weights={**WEIGHTS, "again": 0.5}),
    "replay, 4e-3": Variant("replay", ("train.lr=4e-3",)),
    "short answers, adamw 5e-4": Variant("lr 5e-4", sources=SHORT),
}
"""What is tried."""


def settings(name: str) -> tuple[str, ...]:
    """All settings of a variant, those of what it changes first."""
    variant = VARIANTS[name]
    return (*settings(variant.changes), *variant.settings) if variant.changes else variant.settings


def sources(name: str) -> tuple[str, ...]:
    """What a variant trains on."""
    variant = VARIANTS[name]
    return variant.sources or sources(variant.changes or "")


def weights(name: str) -> dict[str, float] | None:
    """How what a variant trains on is mixed."""
    variant = VARIANTS[name]
    return variant.weights or (weights(variant.changes) if variant.changes else None)


def stage_of(
    data: Path, overrides: Sequence[str], names: Sequence[str], mixed: dict[str, float] | None = None
) -> tuple[Recipe, StageSpec]:
    """The recipe, and its stage with these settings and sources."""
    recipe = load_recipe(shipped("laptop"), (f"data={data}", *(f"{STAGE}.{setting}" for setting in overrides)))
    stage, found = recipe.stage(STAGE), [SOURCES[source] for source in names]
    if mixed is not None:
        again = passages(recipe)
        found = [source.model_copy(update={"weight": mixed[source.name]}) for source in found]
        found += [source.model_copy(update={"weight": mixed["again"] / len(again)}) for source in again.values()]
    mixing = None if mixed is None else MixingSpec()
    spec = stage.data.model_copy(update={"sources": found, "mixing": mixing, "heldout_per_mille": HELD_OUT})
    return recipe, stage.model_copy(update={"data": spec})


def trial(name: str, data: Path, run: Path, out: Path, seed: int, seconds: float, most_bytes: int) -> dict[str, Any]:
    """Train a variant for so long and measure it."""
    recipe, stage = stage_of(data, settings(name), sources(name), weights(name))
    tokenizer = KeuralTokenizer.load(run / "tokenizer")
    prepared = prepare(stage.data, stage.objective, data, tokenizer, out / "data", recipe.spec.seed)
    trainer = trainer_of(stage, prepared, build_config(recipe, tokenizer), tokenizer, run, seed, run / PRETRAINED / "model")
    tokens, steps = train_for(trainer, stage, seconds) if seconds else (0, 0)
    trainer.policy.eval()
    return {
        "variant": name,
        "seed": seed,
        "seconds": seconds,
        "tokens": tokens,
        "steps": steps,
        "bits": bits(recipe, trainer, tokenizer, run, most_bytes),
        "heldout": heldout(trainer, data, tokenizer, run, out),
        "samples": sample_answers(recipe, trainer.policy.model, tokenizer),
    }


def bits(recipe: Recipe, trainer: Trainer, tokenizer: KeuralTokenizer, run: Path, most_bytes: int) -> dict[str, float]:
    """Bits per byte of the held-out texts of RUN's pretraining, read without overlap."""
    found = {}
    for spec in recipe.spec.evaluation.bits_per_byte:
        stage = recipe.stage(spec.stage)
        held = find_by_settings(stage.data, stage.objective, tokenizer, run / "data", recipe.spec.seed)
        if spec.overlap or held is None:
            continue
        texts = cut(measured_texts(spec, held), most_bytes)
        found[spec.name] = bits_per_byte(trainer.policy.model, tokenizer, texts, stage.data.sequence_length)["bits_per_byte"]
    return found


def heldout(trainer: Trainer, data: Path, tokenizer: KeuralTokenizer, run: Path, out: Path) -> dict[str, float]:
    """Loss on held-out answers by source, of all sources, whatever the trial trained on."""
    recipe, stage = stage_of(data, (), [name for name, source in SOURCES.items() if source.limit is None])
    prepared = prepare(stage.data, stage.objective, data, tokenizer, out / "data", recipe.spec.seed)
    assert prepared.heldout is not None
    job = StageJob(
        stage=stage, seed=0, model_config=trainer.policy.model.config, init=None, train_store=prepared.corpus, heldout_store=None,
        tokenizer_sha=tokenizer.sha256, run_dir=run, fingerprint="",
    )  # fmt: skip
    return losses_by_source(trainer, stream_of(job, prepared.heldout, trainer.ranks))


def losses_by_source(trainer: Trainer, stream: Stream) -> dict[str, float]:
    """Loss on the answers of a held-out store with several sources, in nats per token, by source."""
    figures = evaluate(trainer, stream, None).figures
    return {key.split("/")[1]: value for key, value in figures.items() if key.startswith("source/") and key.endswith("/loss")}


def rows(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A row per trial: bits per byte, held-out loss by source; below it its answers."""
    sources = list(dict.fromkeys(name for line in lines for name in line["heldout"]))
    names = list(lines[0]["bits"]) + sources
    head = ["trial", "changes", "steps", *names]
    table = [head, ["---"] * len(head)]
    for line in lines:
        losses = [f"{line['heldout'][name]:.3f}" if name in line["heldout"] else "–" for name in sources]
        values = [f"{value:.3f}" for value in line["bits"].values()] + losses
        changes = VARIANTS[line["variant"]].changes if line["seconds"] else "nothing is trained"
        table.append([line["variant"], changes or "", str(line["steps"]), *values])
    found = [f"| {' | '.join(row)} |" for row in table]
    for line in lines:
        answers = "; ".join(f"{sample['prompt']} → {sample['answer']!r}" for sample in line["samples"])
        found.append(f"\n**{line['variant']}**: {answers}")
    return found


def main() -> None:
    """Run the trials that are asked for and print the table of all that there are."""
    parser = parser_of(__doc__, list(VARIANTS), "runs/speaking-sweep", 40.0, 15_000)
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()

    def run(name: str, seed: int) -> dict[str, Any]:
        return trial(name, arguments.data, arguments.run, arguments.out, seed, arguments.seconds, arguments.bytes)

    lines = run_trials(arguments, run)
    if lines:
        print("\n".join(rows(lines)))


if __name__ == "__main__":
    main()
