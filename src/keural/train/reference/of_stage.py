"""The reference values of a stage: which file they are in, what of them is missing, and whether that may be computed.

In: a stage's settings, the weights that it starts from, its data. Out: the values of all pairs that it will see, or one line that
says why they cannot be had.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from keural.data.loading.batch import Batch
from keural.data.tokens.store import TokenStore
from keural.errors import UserError
from keural.files import fingerprint, sha256_file
from keural.model import KeuralConfig
from keural.model.config_fields import FIELDS
from keural.pretrained.safetensors import weight_files
from keural.recipe import StageSpec
from keural.train.processes.ranks import Ranks
from keural.train.reference.cache import ReferenceCache
from keural.train.reference.records import MANIFEST, RecordFile, ReferenceIdentity


def is_cached(stage: StageSpec) -> bool:
    """Whether the stage goes by reference values that are computed once and kept."""
    return stage.needs_reference and stage.reference.reference == "cached"


def is_online(stage: StageSpec) -> bool:
    """Whether the stage computes reference values in every step."""
    return stage.needs_reference and stage.reference.reference == "online"


def identity_of(stage: StageSpec, config: KeuralConfig, tokenizer_sha: str, weights: str) -> ReferenceIdentity:
    """What a stage's reference values are computed from; `weights` is the fingerprint of those that it starts from."""
    network = {name: getattr(config, name) for name, changes in FIELDS.items() if changes == "network"}
    halved = "" if stage.train.precision.startswith("fp32") else " over weights in bfloat16"
    stored = f"{halved}, norms and routers, too" if stage.train.precision == "published" else halved
    return ReferenceIdentity(
        weights=weights,
        network=fingerprint(network),
        tokenizer=tokenizer_sha,
        precision=f"computed in {stage.train.compute_dtype}{stored}",
        scored="all tokens alike" if stage.dpo.ld_alpha == 1 else f"tokens beyond the shorter answer by {stage.dpo.ld_alpha:g}",
    )


def weights_fingerprint(init: Path | None, seed: int) -> str:
    """Of the weights in a model directory, or of those drawn from `seed`."""
    if init is None:
        return f"random {seed}"
    return fingerprint({path.name: sha256_file(path) for path in weight_files(init)})


@dataclass(frozen=True)
class ReferencePlace:
    """Where a stage's reference values are kept."""

    file: RecordFile
    given: bool
    """Whether the recipe names it (`reference_path`): then nothing is computed but where that alone was asked for."""

    def cache(self, store: TokenStore, ranks: Ranks) -> ReferenceCache:
        """The values of a store's pairs that are there."""
        return ReferenceCache(self.file, store, ranks)

    def check(self, cache: ReferenceCache, batches: Iterable[Batch], what: str) -> None:
        """Raise `UserError` unless the values of all pairs of `batches` are there, none damaged. Every rank must call it."""
        missing, number = cache.missing(batches)
        if cache.damaged:
            raise UserError(f"{self.file.path}: {cache.damaged} records are damaged; bring it along again, or {REMEDY}")
        if missing:
            raise UserError(
                f"{self.file.directory}: has no reference values for {missing:,} of the {number:,} {what} pairs: it is not "
                f"complete, or is of other data; {REMEDY}"
            )


REMEDY = "have the rest computed into it with --reference-only, or leave reference_path out"


def place_of(stage: StageSpec, identity: ReferenceIdentity, directory: Path) -> ReferencePlace:
    """The directory of the values of this identity: below `directory`, or what the recipe names.

    Raises `UserError` when the recipe names one that is not there, or holds another model's values only.
    """
    if stage.reference.reference_path is None:
        return ReferencePlace(RecordFile(directory / identity.key, identity), given=False)
    given = Path(stage.reference.reference_path).expanduser()
    if not given.is_dir():
        raise UserError(f"{stage.name}: {stage.objective}.reference_path: {given}: no such directory")
    if (given / MANIFEST).is_file():
        return ReferencePlace(RecordFile(given, identity), given=True)
    others = [ReferenceIdentity.read(path) for path in sorted(given.glob(f"*/{MANIFEST}"))]
    if others and identity not in others:
        found = "; ".join(sorted({identity.differences(other) for other in others}))
        raise UserError(
            f"{stage.name}: {stage.objective}.reference_path: {given}: holds reference values of another model ({found})"
        )
    return ReferencePlace(RecordFile(given / identity.key, identity), given=True)
