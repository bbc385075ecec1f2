"""What a stage works on, and what came out of it."""

from dataclasses import dataclass
from pathlib import Path

from keural.data.loading.corpus import Corpus
from keural.lora.layers import TrainedAdapter
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.recipe import StageSpec


@dataclass(frozen=True)
class StageJob:
    """What to train, on what, from where, and where to put it."""

    stage: StageSpec
    seed: int
    model_config: KeuralConfig
    init: Path | None
    """Model directory to start from; None draws random weights from `seed`."""
    train_store: Path | Corpus
    heldout_store: Path | None
    tokenizer_sha: str
    run_dir: Path
    fingerprint: str
    """Of everything that determines a step of the stage, whatever their number; checkpoints with another one are refused."""
    budget_seconds: float | None = None
    """Time for the stage, where it has a `budget_share`."""
    boards: tuple[str, ...] = ()
    """Names of `keural.train.stage.boards.BOARDS`: where figures are shown, beside the stage's own file."""
    references: Path | None = None
    """Where reference values are kept, by what they are computed from; None: `reference` in `run_dir`."""


@dataclass(frozen=True)
class StageResult:
    """What came out. `seconds`, `tokens` (non-padding tokens seen) and `steps` include earlier runs of an interrupted stage;
    `loss_first` and `loss_last` are the mean task loss of the first and last tenth of the steps, at most ten of each; `model`
    has float32 weights in every precision, and is sharded under torchrun; `trained` of its parameters were trained.
    """

    name: str
    seconds: float
    tokens: int
    steps: int
    loss_first: float
    loss_last: float
    heldout: dict[str, float]
    model: KeuralMoECausalLM
    trained: int
    interrupted: bool
    adapter: TrainedAdapter | None = None
    """Of a stage with `lora`; `model` is the base then, with PEFT's layers in it."""
