"""What a stage is made of: its data, checked; its model, its optimizer, and the model that it is compared with.

In: a `StageJob`. Out: streams, a policy with its initial values on this process's device, sharded over all.
"""

from pathlib import Path

import torch

from keural.data.loading.corpus import Corpus
from keural.data.loading.row_layout import RowShape
from keural.data.loading.stream import Stream
from keural.errors import UserError
from keural.lora.layers import TrainedAdapter, adapt, store_frozen
from keural.lora.merge import weights_digest
from keural.model import KeuralMoECausalLM
from keural.pretrained.stored_model import open_network
from keural.recipe import OBJECTIVES, StageSpec, TrainSpec
from keural.train.checks.record import CHECKS_FILE, ChecksFile, check_data
from keural.train.initial.parts import Parts, Share, fill
from keural.train.initial.weights import initial_model, initial_parts
from keural.train.network.policy import Compute, Policy, needs_engine
from keural.train.optimization.optimizer import Optimizer, build_optimizer, build_split_optimizer, stored_in_halves
from keural.train.optimization.split import split
from keural.train.optimization.trainable import count_all, count_trained, freeze, frozen_digest, take_out
from keural.train.processes.modes import SPLIT, shards_of
from keural.train.processes.parallel import check_ranks, prepare_layers, shard
from keural.train.processes.ranks import Ranks
from keural.train.reference.online import OnlineReference
from keural.train.stage.job import StageJob
from keural.train.stage.kept import choose_kept

COMPILED_ROWS = 128
"""Rows of pairs are filled up to a multiple of so many tokens under `train.compile`: each length is compiled once."""


def stream_of(job: StageJob, store: Path | Corpus, ranks: Ranks) -> Stream:
    """The stream over a store of this job; refuses one made with another tokenizer."""
    stage = job.stage
    rows = None if stage.train.batch_tokens is None else stage.train.batch_tokens // stage.data.sequence_length
    corpus = store if isinstance(store, Corpus) else Corpus((store,))
    settings = (stage.objective, stage.data.sequence_length, rows, stage.train.batch_records, job.seed)
    return corpus.stream(*settings, job.tokenizer_sha, job.model_config.vocab_size, _pair_rows(stage, ranks))


def _pair_rows(stage: StageSpec, ranks: Ranks) -> RowShape:
    """Where attention goes by documents a row of pairs or answers is a forward pass; where it masks rows, it has room for those
    sequences that cannot be divided.
    """
    spec = stage.train
    has_kernels = ranks.device.type == "cuda" and spec.compute_dtype == "bfloat16" and _has_engine(stage, ranks)
    goes_by_documents = _by_documents(spec, ranks) or has_kernels
    shortest = OBJECTIVES[stage.objective].sequences_per_row * stage.data.sequence_length
    limit = spec.micro_batch_tokens if goes_by_documents else shortest
    return RowShape(limit, COMPILED_ROWS if spec.compile else 1)


def _has_engine(stage: StageSpec, ranks: Ranks) -> bool:
    """Whether the training engine computes the stage."""
    return stage.lora is not None or needs_engine(stage.train, ranks)


def _by_documents(spec: TrainSpec, ranks: Ranks) -> bool:
    """Whether the model's own layers attend to one document after another; they cannot be compiled then."""
    return ranks.device.type == "cpu" and not spec.compile


def checked_data(job: StageJob, stream: Stream, heldout: Stream | None, ranks: Ranks, keep: bool = True) -> ChecksFile:
    """What the stage's data was checked for. Raises `UserError` as the checks do."""
    path = job.run_dir / CHECKS_FILE if keep else None
    streams = {"training": stream} | ({"held-out": heldout} if heldout else {})
    found, lines = ranks.on_main(lambda: check_data(path, job.stage, job.model_config, streams))
    for line in lines:
        ranks.log_once(f"{job.stage.name}: {line}")
    return found


def open_data(job: StageJob, ranks: Ranks, *, keep: bool = True) -> tuple[Stream, Stream | None, ChecksFile]:
    """The streams over a stage's training and held-out data, and what both were checked for (`keep`: in the stage's directory).

    Raises `UserError` for a number of ranks that the stage cannot have, and as the checks do.
    """
    check_ranks(job.stage, ranks.world, job.model_config)
    stream = stream_of(job, job.train_store, ranks)
    heldout = stream_of(job, job.heldout_store, ranks) if job.heldout_store else None
    return stream, heldout, checked_data(job, stream, heldout, ranks, keep)


def policy_of(job: StageJob, uniform: bool, ranks: Ranks) -> tuple[Policy, Optimizer, str]:
    """Model and optimizer with their initial values, sharded over the ranks; and the digest of what is frozen."""
    policy, frozen, parts = _policy(job, uniform, ranks)
    model, spec = policy.model, job.stage.train
    if (trained := count_trained(model)) < (total := count_all(model)):
        ranks.log_once(f"{job.stage.name}: trains {trained:,} of {total:,} parameters")
    if spec.precision in SPLIT and ranks.world == 1:
        optimizer = build_split_optimizer(model, spec, ranks.device)
        policy.to(ranks.device)  # what the optimizer has not moved
        return policy, optimizer, frozen
    _place(policy, spec, ranks, dict(parts))
    if spec.precision in SPLIT:
        return policy, build_split_optimizer(model, spec, ranks.device, parts), frozen_digest(model)
    parts.clear()
    return policy, build_optimizer(model, spec), frozen or frozen_digest(model)


def computing_policy(job: StageJob, uniform: bool, ranks: Ranks) -> Policy:
    """The same model where nothing is trained, without moments."""
    policy, _, parts = _policy(job, uniform, ranks)
    _place(policy, job.stage.train, ranks, parts)
    return policy


def _place(policy: Policy, spec: TrainSpec, ranks: Ranks, parts: Parts) -> None:
    """Bring a model whose weights stay in one type to its device; on several ranks it is sharded, and gets its values then."""
    if spec.precision == "published":
        for parameter in policy.model.parameters():
            parameter.data = parameter.data.bfloat16()
    if spec.precision in SPLIT:
        for name, parameter in stored_in_halves(policy.model).items():
            parameter.data = split(parameter.data)[0] if ranks.world == 1 else parameter.data.bfloat16()  # which has no values yet
            if name in parts:
                parts[name] = split(parts[name])[0]
    if ranks.world == 1:
        policy.to(ranks.device)
    if policy.engine is None:
        prepare_layers(policy.model, spec)
    shard(policy, policy.model, spec, ranks)
    if ranks.world > 1:
        fill(policy, policy.model, parts, ranks.device)


def _policy(job: StageJob, uniform: bool, ranks: Ranks) -> tuple[Policy, str, Parts]:
    """Model with its initial values, on the CPU, and the digest of what is frozen; among several ranks a model without memory, and
    this rank's parts of the values.
    """
    spec = job.stage.train
    chats = OBJECTIVES[job.stage.objective].store != "documents"
    settings = (job.model_config, job.init, job.seed, ranks.device, spec.compile, job.tokenizer_sha)
    engine, by_documents = _engine(job, uniform, ranks), _by_documents(spec, ranks)
    if ranks.world > 1:
        shards = shards_of(spec, ranks.world)
        share = Share(ranks.rank % shards, shards, spec.expert_parallel)
        model, parts = initial_parts(*settings, share, chats=chats, say=ranks.log_once)
        take_out(model, job.stage.router)
        return Policy(model, getattr(torch, spec.compute_dtype), engine, by_documents=by_documents).train(), "", parts
    model = initial_model(*settings, chats=chats, say=ranks.log_once)
    adapter = _adapter(job, model)
    frozen = adapter.base_digest if adapter else freeze(model, job.stage.router)
    return Policy(model, getattr(torch, spec.compute_dtype), engine, adapter, by_documents=by_documents).train(), frozen, {}


def online_reference(job: StageJob, policy: Policy, uniform: bool, ranks: Ranks) -> OnlineReference:
    """What computes reference values in each step: the policy with its adapter off, or a second one whose weights stay."""
    return OnlineReference(policy if policy.adapter is not None else computing_policy(job, uniform, ranks), job.stage.dpo.ld_alpha)


def _adapter(job: StageJob, model: KeuralMoECausalLM) -> TrainedAdapter | None:
    """Adapters around the model's layers, where the stage trains them. Raises `UserError` for a model that had to be changed."""
    lora = job.stage.lora
    if lora is None:
        return None
    assert job.init is not None, "the recipe refuses adapters of random weights"
    stored = open_network(job.init, verify=False)  # the model's weights were verified when they were read
    if stored.config.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{job.stage.name}: {job.init} has no rows for the two ChatML ids, and an adapter has no place for new ones; import it "
            "again with --grow-vocabulary, or train the whole model"
        )
    adapter = adapt(model, lora, job.seed, job.init, weights_digest(stored.weights))
    store_frozen(model, getattr(torch, lora.base_dtype))
    return adapter


def _engine(job: StageJob, uniform: bool, ranks: Ranks) -> Compute | None:
    """The training engine, where the stage needs it, as adapters do; importing it takes seconds."""
    if not _has_engine(job.stage, ranks):
        return None
    from keural.train.network.engine import engine_for

    kept = choose_kept(job.stage, job.model_config, ranks)
    return engine_for(job.stage.train, job.model_config, ranks.device, uniform, kept.mix.modes if kept else None)
