"""Part `align`: steps of SFT and DPO by the trainer itself, at the real shapes.

In: two and four layers, the settings of `keural-14b` for one such card, sequences of drawn lengths. Out: seconds of a step and of
the reference pass, and by difference real tokens and pairs per second of 24 layers.

A step is `train_step`: rows packed by the stream, forward and backward pass, clipping, the optimizer that fits the card; as in a
stage, in reproducible mode. `router.load` is `lagged`, so that no forward pass is run twice. Learning rates are 0.

- `sft`: conversations of the card's lengths (mean 621, at most 8,192; the width between is an assumption) cut to rows of 4,096;
  the first third of each is not trained.
- `dpo`: pairs whose sides have 500 tokens in the mean and at most 1,024, the published limit; what lies between is not published.
  Half of the shorter side is the prompt of both.
- `dpo_longest`: both sides of 1,024, the most that a published pair can have cost.
"""

import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu_parts.baselines import hf_model
from benchmarks.gpu_parts.bench import BF16, GIB, REAL, Bench
from benchmarks.packing import LONGEST, MEAN, draw
from keural.data.loading.row_layout import RowShape
from keural.data.loading.stream import Stream
from keural.data.tokens.store import StoreWriter, TokenStore
from keural.model import KeuralMoECausalLM
from keural.recipe import StageSpec, load_recipe
from keural.recipe.shipped import SHIPPED
from keural.train.loop import train_step
from keural.train.network.engine import engine_for
from keural.train.network.policy import Policy
from keural.train.objectives.registry import LOSSES
from keural.train.optimization.optimizer import build_split_optimizer
from keural.train.optimization.split import SplitAdamW
from keural.train.processes.ranks import Ranks
from keural.train.reference.cache import ReferenceCache
from keural.train.reference.of_stage import identity_of
from keural.train.reference.online import values_by
from keural.train.reference.records import RecordFile
from keural.train.stage.building import COMPILED_ROWS
from keural.train.stage.signals import reproducible
from keural.train.stage.step_plan import no_learning
from keural.train.trainer import Trainer

SIDE_MEAN, SIDE_LONGEST, SIDE_WIDTH = 500, 1024, 0.7
CONVERSATIONS, PAIRS = 1500, 256
BATCH_TOKENS, BATCH_PAIRS = 65_536, 64
RECIPE_TOKENS = 262_144
"""What a step of SFT has in the recipe; its gradients take four times those that are measured, its update the same."""
CASES = ("sft", "dpo", "dpo_longest")


@dataclass(frozen=True)
class Step:
    """A step's pairs, tokens and positions, and the seconds of its gradients, of its update and, of pairs, of the pass for their
    reference values.
    """

    pairs: int
    tokens: int
    positions: int
    seconds: dict[str, float]


def align(bench: Bench) -> None:
    """Every case with four layers, then with two, then for 24; not in reproducible mode where nothing runs in it."""
    with tempfile.TemporaryDirectory() as directory:
        stages = {case: stage_of(bench, case) for case in CASES}
        stores = {case: write_store(bench, case, Path(directory)) for case in CASES}
        for name, mode in (("reproducible", reproducible(bench.device)), ("not_reproducible", nullcontext())):
            found: dict[str, dict[int, Step]] = {case: {} for case in CASES}
            with mode:
                for layers in (4, 2):
                    with bench.guarded(f"{name}_{layers}", 15):
                        steps_of(bench, layers, stages, stores, found)
            if any(found.values()):
                break
    for case, steps in found.items():
        if len(steps) == 2:
            whole_model(bench, case, steps[4], steps[2])


def stage_of(bench: Bench, case: str) -> StageSpec:
    """The recipe's stage for a card of this size, with steps that are short enough to be repeated."""
    total = torch.cuda.get_device_properties(0).total_memory / GIB if bench.cuda else 0.0
    length = bench.size.length if case == "sft" else longest_side(bench)
    name = case.split("_")[0]
    values: dict[str, Any] = {"router.load": "lagged", "data.sequence_length": length}
    if bench.small:
        values["train.micro_batch_tokens"] = 2 * bench.size.length
    values |= {"train.batch_tokens": 4 * bench.size.length if bench.small else BATCH_TOKENS} if name == "sft" else {}
    values |= {"train.batch_pairs": 8 if bench.small else BATCH_PAIRS} if name == "dpo" else {}
    recipe = SHIPPED / ("keural-14b-h100" if total < 120 else "keural-14b-h200")
    return load_recipe(recipe, ["data=.", *(f"{name}.{key}={value}" for key, value in values.items())]).stage(name)


def longest_side(bench: Bench) -> int:
    """Tokens of the longest side of a pair; as much shorter as the model's rows are."""
    return SIDE_LONGEST * bench.size.length // REAL.length


def lengths_of(bench: Bench, case: str) -> NDArray[np.int64]:
    """Of conversations ``[n]``, or of the sides of pairs ``[n, 2]``."""
    scale, longest = bench.size.length / REAL.length, longest_side(bench)
    if case == "sft":
        return np.minimum(draw(CONVERSATIONS, 1.0, MEAN * scale, int(LONGEST * scale)), bench.size.length)
    if case == "dpo_longest":
        return np.full((PAIRS, 2), longest)
    return draw(2 * PAIRS, SIDE_WIDTH, SIDE_MEAN * scale, longest).reshape(-1, 2)


def write_store(bench: Bench, case: str, directory: Path) -> TokenStore:
    """Random tokens of these lengths."""
    random, vocabulary = np.random.default_rng(0), bench.size.config.vocab_size
    kind = "conversations" if case == "sft" else "pairs"
    with StoreWriter(directory / case / "store", "0" * 64, vocabulary, kind) as writer:  # type: ignore[arg-type]
        for lengths in lengths_of(bench, case):
            untrained = int(lengths) // 3 if case == "sft" else int(lengths.min()) // 2
            prompt = random.integers(4, vocabulary, untrained)
            for length in np.atleast_1d(lengths).tolist():
                ids = np.concatenate([prompt, random.integers(4, vocabulary, length - untrained)])
                writer.add(ids.astype(np.uint32), np.arange(length) >= untrained)
    return TokenStore.open(directory / case / "store")


def steps_of(
    bench: Bench,
    layers: int,
    stages: dict[str, StageSpec],
    stores: dict[str, TokenStore],
    found: dict[str, dict[int, Step]],
) -> None:
    """Time every case on one model and its optimizer."""
    model = hf_model(bench.size.layers(layers), torch.float32, bench.device, "grouped_mm")
    optimizer = build_split_optimizer(model, stages["sft"].train, bench.device)
    for case in CASES:
        with bench.guarded(case, 15):
            found[case][layers] = measured(bench, case, layers, stages[case], stores[case], model, optimizer)
        optimizer.zero_grad()


def measured(
    bench: Bench,
    case: str,
    layers: int,
    stage: StageSpec,
    store: TokenStore,
    model: KeuralMoECausalLM,
    optimizer: SplitAdamW,
) -> Step:
    """The same step of a stage, several times."""
    objective, ranks = LOSSES[stage.objective](stage), Ranks(0, 1, bench.device)
    policy = Policy(model, BF16, engine_for(stage.train, model.config, bench.device, objective.uniform)).train()
    spec, length = stage.train, stage.data.sequence_length
    rows = None if spec.batch_tokens is None else spec.batch_tokens // length
    shape = RowShape(spec.micro_batch_tokens, COMPILED_ROWS if spec.compile else 1)
    stream = Stream(store, stage.objective, length, rows, spec.batch_pairs, pair_rows=shape)
    references, seconds = None, {}
    if stage.objective == "dpo":
        references, seconds["reference"] = reference_pass(bench, case, layers, stage, stream, policy, ranks)
    reached: list[float] = []
    trainer = Trainer(
        stage, policy, optimizer, objective, stream, ranks, no_learning, references, before_update=partial(note, bench, reached)
    )
    begun = now(bench)
    first = train_step(trainer, 0)
    first_s = now(bench) - begun
    bench.free()
    parts: dict[str, list[float]] = {"gradients": [], "update": []}
    for _ in range(3 if bench.cuda else 1):
        begun = now(bench)
        report = train_step(trainer, 0)
        ended = now(bench)
        parts["gradients"].append(reached[-1] - begun)
        parts["update"].append(ended - reached[-1])
    seconds |= {name: statistics.median(values) for name, values in parts.items()}
    batch = stream.batch(0)
    bench.record(
        case,
        rows=list(batch.input_ids.shape),
        micro_batch_tokens=spec.micro_batch_tokens,
        pairs=len(batch.pairs),
        tokens=report.tokens,
        real_share=round(report.real_share, 4),
        real_share_of_epoch=round(real_share(stream), 4),
        labels=batch.num_labels,
        loss=round(first.loss, 5),
        same_loss_again=first.loss == report.loss,
        precision=spec.precision,
        recompute=spec.recompute,
    )
    bench.record(case, **{f"layers_{layers}": rounded(seconds) | {"first_s": round(first_s, 1), "peak_gib": bench.peak()}})
    return Step(len(batch.pairs), report.tokens, batch.input_ids.size, seconds)


def real_share(stream: Stream) -> float:
    """Positions that hold a token, over the steps of an epoch."""
    batches = [stream.batch(step) for step in range(stream.steps_per_epoch)]
    return sum(batch.num_tokens for batch in batches) / sum(batch.input_ids.size for batch in batches)


def reference_pass(
    bench: Bench, case: str, layers: int, stage: StageSpec, stream: Stream, policy: Policy, ranks: Ranks
) -> tuple[ReferenceCache, float]:
    """The cache of a step's pairs, filled twice: the first time graphs are compiled."""
    assert isinstance(stream.store, TokenStore)
    compute = values_by(policy, recording=stage.train.compile, ld_alpha=stage.dpo.ld_alpha)  # as a stage does
    identity = identity_of(stage, policy.model.config, "0" * 64, "random 0")
    for attempt in (0, 1):
        directory = stream.store.directory.parent / f"reference-{layers}-{attempt}"
        cache = ReferenceCache(RecordFile(directory, identity), stream.store, ranks)
        begun = now(bench)
        cache.fill(compute, [stream.batch(0)], stage.train.micro_batch_tokens)
        seconds = now(bench) - begun
    bench.record(case, reference_file_bytes=sum(path.stat().st_size for path in directory.iterdir()))
    return cache, seconds


def now(bench: Bench) -> float:
    """The clock, when the device has done what it was given."""
    if bench.cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def note(bench: Bench, reached: list[float]) -> None:
    """Write down when a step's gradients were there."""
    reached.append(now(bench))


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """The same for a reader."""
    return {f"{name}_s": round(value, 4) for name, value in seconds.items()}


def whole_model(bench: Bench, case: str, four: Step, two: Step) -> None:
    """What 24 layers would take, by the difference of four and two, and what that makes per second."""
    more = (REAL.config.num_hidden_layers - 4) / 2
    taken = {name: value + more * (value - two.seconds[name]) for name, value in four.seconds.items()}
    bench.record(case, layers_24=rounded(taken))
    gradients, update = taken["gradients"], taken["update"]
    if case == "sft":
        steps = RECIPE_TOKENS / four.positions if not bench.small else 1.0
        rates = {"tokens_per_s": four.tokens * steps / (gradients * steps + update)}
        rates["tokens_per_s_without_update"] = four.tokens / gradients
    else:
        rates = {"pairs_per_s": four.pairs / (gradients + update), "pairs_per_s_without_update": four.pairs / gradients}
        rates |= {"reference_pairs_per_s": four.pairs / taken["reference"], "tokens_per_pair": four.tokens / four.pairs}
    bench.record(case, **{name: round(rate, 2) for name, rate in rates.items()})
