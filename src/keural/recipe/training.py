"""One training stage: objective, optimisation, router losses."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from keural.recipe.base import Part, Spec, length, length_list, neutral, not_for
from keural.recipe.data import DataSpec
from keural.recipe.expert_parallel import ExpertParallel, why_not_expert_parallel
from keural.recipe.lora import LoraSpec, why_not_adapted
from keural.recipe.objectives import OBJECTIVES, STORES, Objective
from keural.recipe.optimizer import MuonSpec, OptimizerName, why_not_muon
from keural.recipe.preferences import DpoSpec, KtoSpec, ReferenceSpec


class TrainSpec(Spec):
    """Optimisation of one stage: one of `steps`, `epochs`, `budget_share`; batches are per optimizer step, not per device."""

    steps: int | None = length(None, gt=0)
    """Optimizer steps of the stage."""
    epochs: float | None = length(None, gt=0)
    """Length of the stage in epochs, which may end within one; rounded up to whole optimizer steps."""
    budget_share: float | None = length(None, gt=0, le=1)
    """Share of the recipe's time budget; the number of steps is measured and fixed before step 0."""
    max_epochs: float | None = length(None, gt=0)
    """With budget_share: the most epochs that the stage reads of its data, however much time it has, rounded up to whole steps. The
    rest of its share is not used: other stages keep theirs, and the run ends earlier."""
    batch_tokens: int | None = Field(None, gt=0)
    """Tokens per optimizer step (next_token, sft): a multiple of data.sequence_length."""
    batch_pairs: int | None = Field(None, gt=0)
    """Preference pairs per optimizer step (dpo)."""
    batch_answers: int | None = Field(None, gt=0)
    """Labelled answers per optimizer step (kto). What answers to other prompts say of the policy is measured over all of them, so
    a step should have many."""
    micro_batch_tokens: int | None = neutral("work", None, gt=0)
    """Upper bound of tokens in one forward pass on one rank; default: the rank's whole share at once. Gradients are the same sums,
    cut elsewhere, so weights differ by rounding at most; with router.scope micro_batch the cut is part of the loss, and counts."""
    lr: float = Field(gt=0)
    """Highest learning rate, reached at the end of the warm-up."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate of the last step; with the value of `lr` the rate stays, for a later stage to decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises linearly; the first step already moves."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls to `min_lr`: on a half cosine, or on a line."""
    decay_share: float = Field(1.0, gt=0, le=1)
    """Share of the steps after the warm-up, the last ones, in which the learning rate falls; before them it stays at `lr` (warm-up,
    stable, decay: Hu et al. 2024, arXiv:2404.06395). A stage may be made longer as long as it has not fallen."""
    optimizer: OptimizerName = "adamw"
    """What changes the weights: AdamW, or Muon for the matrices of the layers and AdamW for the rest, with half the state for
    these matrices. Muon needs precision fp32 and trains no lora; on several processes each gathers the matrices and does all of
    its iterations."""
    muon: MuonSpec = Field(default_factory=MuonSpec)
    """Settings of optimizer muon; refused with another."""
    betas: list[float] = Field(default_factory=lambda: [0.9, 0.95], min_length=2, max_length=2)
    """AdamW's decay rates of the mean gradient and of its mean square."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's addition to the root of the mean square."""
    weight_decay: float = Field(0.1, ge=0)
    """Applied to matrices only, never to norms."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm, taken over all of them, where it is larger."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision that the network computes in; bfloat16 with precision split, split-host and published."""
    precision: Literal["fp32", "fp32-bf16m", "split", "split-host", "published"] = "fp32"
    """What is stored. `fp32`: weights, gradients and both moments in float32, 16 bytes per parameter. `fp32-bf16m`: the same with
    moments in bfloat16, 12 bytes; what several accelerators want. `split`: a bfloat16 weight and a 16-bit remainder, together the
    float32 weight bit for bit, bfloat16 gradients and 8-bit moments, 8.03 bytes. `split-host`: the same on one process, remainder
    and moments in the host's memory, 4 bytes on the device. `published`: everything in bfloat16 and rounded to the nearest, 8
    bytes, as the published trainer had it; steps smaller than a weight's spacing are lost, so for comparison only."""
    recompute: Literal["none", "selective", "full", "budget"] = neutral("work", "none")
    """What of a layer is computed again in the backward pass instead of kept. `full`: all of it. `selective`: what is cheap (norms,
    rotation, activation, permutations); products, attention and the router's choice are kept. `budget`: as few layers `full`, then
    as few `selective`, as the planned memory allows, chosen when the stage starts. On a CPU the same bits, otherwise up to
    rounding."""
    memory_gib: float | None = neutral("work", None, gt=0, le=100_000)
    """With recompute budget: GiB that a stage may take of one device by plan; none: all that an accelerator has."""
    shard_over: int | None = neutral("work", None, gt=0)
    """Processes that share one copy of weights, gradients and moments, each holding a part: those of a node, where links between
    nodes are slow (hybrid sharding). Their number must divide that of all; none, or no more processes than that: all share one
    copy."""
    expert_parallel: ExpertParallel = neutral("work", 1)
    """Neighbouring processes that have other experts each, to which tokens are sent instead of gathering all experts: for slow
    links or small micro-batches. It must divide the experts, and the processes that share a copy of the weights; those that have
    the same experts divide them by width. Refused with precision split-host and lora; 1: every process gathers all experts."""
    compile: bool = neutral("work", False)
    """Compile the layers; the same numbers up to rounding."""
    skip_spikes: float | None = Field(None, gt=0)
    """A step whose loss or gradient norm lies more than so many standard deviations above the mean of the 128 steps before is not
    taken (OLMo 2 does so at 6); none: every finite step is. Ten such steps in a row stop the stage."""
    steps_to_skip: list[int] = length_list()
    """Steps, counted from 0, whose batches are not trained on: of a batch that spoils the weights. Steps that are not done yet may
    be added when a stage goes on."""
    stuck_after: float = neutral("check", 1800.0, ge=10)
    """Seconds without a step, an evaluation or a checkpoint after which a process ends itself, saying where it was."""
    save_every: int | None = neutral("keeping", None, gt=0)
    """Steps between checkpoints; none: every ten minutes, and saving takes at most a twentieth of the time. The last step is
    always saved."""
    keep_checkpoints: int = neutral("keeping", 1, gt=0)
    """Checkpoints to keep; older ones are deleted when a new one is whole."""
    keep_every: int | None = neutral("keeping", None, gt=0)
    """Checkpoints of steps that are multiples of this are kept for good; a multiple of save_every. None: of none."""
    evaluate_every: int | None = neutral("keeping", None, gt=0)
    """Steps between evaluations on held-out data; it is always evaluated at the end."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, data: Any) -> Any:
        if isinstance(data, dict) and "gradient_checkpointing" in data:
            raise ValueError("gradient_checkpointing is called recompute now: full instead of true, none instead of false")
        if isinstance(data, dict) and data.get("precision") in ("split", "split-host", "published"):
            return {"compute_dtype": "bfloat16", **data}
        return data

    @property
    def batch_records(self) -> int | None:
        """Pairs or answers per optimizer step; None where it counts tokens."""
        return self.batch_pairs if self.batch_answers is None else self.batch_answers

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: list[float]) -> list[float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("betas must lie in [0, 1)")
        return betas

    @field_validator("steps_to_skip")
    @classmethod
    def _steps_in_order(cls, steps: list[int]) -> list[int]:
        if steps != sorted(set(steps)) or any(step < 0 for step in steps):
            raise ValueError("steps_to_skip must rise, from 0, each step once")
        return steps

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if sum(value is not None for value in (self.steps, self.epochs, self.budget_share)) != 1:
            raise ValueError("give exactly one of steps, epochs, budget_share")
        if self.max_epochs is not None and self.budget_share is None:
            raise ValueError("max_epochs bounds a stage with a budget_share; with steps or epochs it has no effect: leave it out")
        if not self.precision.startswith("fp32") and self.compute_dtype != "bfloat16":
            raise ValueError(f"precision {self.precision} computes in bfloat16; leave compute_dtype out")
        if self.precision == "fp32-bf16m" and self.betas[1] > 0.99:
            raise ValueError(
                f"precision fp32-bf16m cannot hold a second moment that changes as slowly as betas[1] {self.betas[1]:g} has it: at "
                "most 0.99, or precision fp32"
            )
        if self.memory_gib is not None and self.recompute != "budget":
            raise ValueError(f"memory_gib has no effect with recompute {self.recompute}: set budget, or leave it out")
        if self.recompute in ("selective", "budget") and self.compile and self.compute_dtype == "float32":
            raise ValueError(
                f"recompute {self.recompute} with compile needs compute_dtype bfloat16: there is no compiled grouped product in "
                "float32"
            )
        if (why_not_parallel := why_not_expert_parallel(self)) is not None:
            raise ValueError(why_not_parallel)
        if self.keep_every is not None and (self.save_every is None or self.keep_every % self.save_every):
            raise ValueError("keep_every must be a multiple of save_every: no other steps have checkpoints")
        if self.min_lr > self.lr:
            raise ValueError("min_lr cannot exceed lr")
        if self.min_lr == self.lr and (unread := sorted({"decay", "decay_share"} & self.model_fields_set)):
            raise ValueError(f"{unread[0]} has no effect where min_lr is lr")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError("warmup_steps must be smaller than steps")
        if self.steps is not None and self.steps_to_skip and self.steps_to_skip[-1] >= self.steps:
            raise ValueError(f"steps_to_skip names step {self.steps_to_skip[-1]}, and the last of {self.steps} is {self.steps - 1}")
        return self


class RouterSpec(Spec):
    """Router losses, added to every objective: coefficient times the mean over layers, on non-padding tokens."""

    balance_coef: float = Field(0.02, ge=0)
    """Weight of the load-balancing loss, which is 1 where experts are used evenly; 0 leaves it out."""
    z_coef: float = Field(0.001, ge=0)
    """Weight of the z-loss, the mean square of the log of the router's normaliser; 0 leaves it out."""
    scope: Literal["global_batch", "micro_batch"] = "global_batch"
    """Tokens over which the load is balanced: the whole optimizer step (exact), or each forward pass (as published)."""
    load: Literal["exact", "lagged"] = "exact"
    """With scope global_batch: the load that the balance loss goes by. `exact`: of the same step, for which a step of several
    forward passes runs each of them twice. `lagged`: of the step before (even at the first one), without that; what is reported
    is of the step itself."""
    freeze: bool = False
    """Leave the routers' weights as they are, bit for bit: no gradient, no update, no decay. The two losses are still reported,
    and with a coefficient above 0 still train what comes before a router: attention and experts of the layers below learn to give
    it inputs that it spreads evenly. Set both coefficients to 0 to leave the choice of experts to the task alone."""

    @model_validator(mode="after")
    def _load_of_a_batch(self) -> Self:
        if self.load == "lagged" and self.scope == "micro_batch":
            raise ValueError("load lagged has no effect with scope micro_batch")
        return self


class SftSpec(Spec):
    """Supervised fine-tuning."""

    neftune_alpha: float = Field(0.0, ge=0, le=1000)
    """Noise on the embeddings while training: uniform in [-1, 1] times alpha / sqrt(L H), with L the tokens of the conversation and
    H the width (NEFTune, Jain et al. 2023, arXiv:2310.05914, where alpha is 5 to 15); 0: none."""


class ChecksSpec(Spec):
    """What a stage refuses to train on, looked for before step 0 in stores of any origin: shares of the records, 1 allows all."""

    empty: float = neutral("check", 0.001, ge=0, le=1)
    """Records (sides of pairs, rows of documents) in which nothing is trained."""
    open_answers: float = neutral("check", 0.001, ge=0, le=1)
    """Records with an answer whose end-of-turn token is not trained: a model that never stops."""
    cut_answers: float = neutral("check", 0.001, ge=0, le=1)
    """Records that end within a trained answer."""
    identical_sides: float = neutral("check", 0.001, ge=0, le=1)
    """Pairs whose answers are the same; labelled answers that are compared with themselves."""
    swapped_pairs: float = neutral("check", 0.001, ge=0, le=1)
    """Pairs that are also there with their answers swapped; answers that are there with both labels."""
    one_label: float = neutral("check", 0.99, ge=0.5, le=1)
    """Labelled answers (kto) that have the label which most have, of what the stage trains on."""
    lost_to_length: float = neutral("check", 0.25, ge=0, le=1)
    """Conversations and pairs that data.sequence_length cuts or leaves out, where the store says what it was made from."""


class StageSpec(Spec):
    """One training stage."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    """The name of the stage's file without `.yaml`: small letters, digits and dashes."""
    objective: Objective
    """`next_token` on documents, `sft` on the assistant's turns of conversations, `dpo` on pairs of answers, `kto` on single
    answers with a label."""
    init_from: str = not_for(("weights",), "random")
    """`random`, the name of an earlier stage, or a path with a slash: a model directory, or a stage or run with one, of the same
    network and tokenizer; what determines the weights there is in the fingerprint."""
    data: DataSpec
    """What the stage trains on."""
    train: TrainSpec
    """How long, in what batches, and with which optimizer settings."""
    router: RouterSpec = Field(default_factory=RouterSpec)
    """The two router losses; they join every objective."""
    lora: LoraSpec | None = None
    """Train low-rank adapters in place of the whole model; none: the whole model is trained. One process."""
    dpo: DpoSpec = Field(default_factory=DpoSpec)
    """Settings of objective dpo; refused with any other."""
    kto: KtoSpec = Field(default_factory=KtoSpec)
    """Settings of objective kto; refused with any other."""
    sft: SftSpec = Field(default_factory=SftSpec)
    """Settings of objective sft; refused with any other."""
    checks: ChecksSpec = neutral("check", default_factory=ChecksSpec)
    """How much of what is wrong with the data is let through."""
    notes: list[str] = neutral("report", default_factory=list)
    """Where the numbers come from, contradictions included."""

    def determining(self, part: Part, length: bool = True) -> dict[str, Any]:
        """As for every spec; where router losses are balanced within each forward pass its size is part of the loss."""
        found = super().determining(part, length)
        if self.router.scope == "micro_batch" and self.train.micro_batch_tokens is not None:
            found["micro_batch_tokens"] = self.train.micro_batch_tokens
        return found

    @property
    def reference(self) -> ReferenceSpec:
        """Settings of an objective that may compare with the model that the stage starts from."""
        return self.kto if OBJECTIVES[self.objective].settings == "kto" else self.dpo

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the model that the stage starts from."""
        return OBJECTIVES[self.objective].needs_reference and self.reference.needs_reference

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is reported beside the loss."""
        kind = OBJECTIVES[self.objective]
        return (*kind.metrics, *(kind.reference_metrics if self.needs_reference else ()))

    @property
    def starts_from_directory(self) -> bool:
        """Whether `init_from` is a model directory: a path, which has a slash."""
        return "/" in self.init_from

    @property
    def predecessor(self) -> str | None:
        """The earlier stage that `init_from` names; None for random weights and for a model directory."""
        return None if self.init_from == "random" or self.starts_from_directory else self.init_from

    @model_validator(mode="before")
    @classmethod
    def _labels_wanted(cls, stage: Any) -> Any:
        """Sources of a stage that trains on labelled answers give such."""
        kind = OBJECTIVES.get(str(stage.get("objective"))) if isinstance(stage, dict) else None
        data = stage.get("data") if kind is not None else None
        if kind is None or kind.store != "answers" or not isinstance(data, dict):
            return stage
        filled = {
            name: [{"as_labels": True, **each} if isinstance(each, dict) else each for each in data[name]]
            for name in ("sources", "heldout_sources")
            if isinstance(data.get(name), list)
        }
        return {**stage, "data": {**data, **filled}}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        train, length, name, kind = self.train, self.data.sequence_length, self.objective, OBJECTIVES[self.objective]
        if self.data.shards and kind.store != "documents":
            raise ValueError(f"data.shards hold documents; objective {name} cannot train on them")
        units = dict.fromkeys(store.unit for store in STORES.values())
        if [unit for unit in units if getattr(train, f"batch_{unit}") is not None] != [kind.unit]:
            others = " or ".join(f"train.batch_{unit}" for unit in units if unit != kind.unit)
            raise ValueError(f"objective {name} needs train.batch_{kind.unit} and no {others}")
        if train.batch_tokens is not None and train.batch_tokens % length:
            raise ValueError(f"train.batch_tokens {train.batch_tokens} is not a multiple of data.sequence_length {length}")
        if kind.store != "conversations" and self.data.train_on != "assistant":
            raise ValueError(f"data.train_on is of conversations; it has no effect with objective {name}")
        if kind.store != "documents" and self.data.cleaning is not None:
            raise ValueError(f"data.cleaning is for documents; objective {name} has gates per source")
        if kind.needs_reference and self.init_from == "random":
            raise ValueError(f"objective {name} needs init_from: an earlier stage or a model directory")
        settings = {other.settings for other in OBJECTIVES.values() if other.settings} - {kind.settings}
        if unused := sorted(settings & self.model_fields_set):
            raise ValueError(f"{unused[0]} settings have no effect with objective {name}")
        if self.router.freeze and train.precision == "published":
            raise ValueError("precision published rounds all weights, and router.freeze leaves some as they are; leave one out")
        if (why_not_it := why_not_muon(train, adapted=self.lora is not None)) is not None:
            raise ValueError(why_not_it)
        if self.lora is not None and train.expert_parallel > 1:
            raise ValueError("lora is for one process, and train.expert_parallel for several; leave one of them out")
        if self.lora is not None and (why_not := why_not_adapted(self.lora, self.init_from, train, self.router)):
            raise ValueError(why_not)
        row = kind.sequences_per_row * length
        if train.micro_batch_tokens is not None and train.micro_batch_tokens < row:
            raise ValueError(f"train.micro_batch_tokens {train.micro_batch_tokens} is smaller than one packed row ({row} tokens)")
        return self
