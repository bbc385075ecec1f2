"""How the stages of a recipe are laid out on GPUs: what the recipe states, and for what it leaves open the fastest that fits.

In: a recipe, a card, how many. Out: a layout for each stage with the reason, and what would make it fit where it does not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from keural.errors import UserError
from keural.plan.gpus import GPUS, Gpu
from keural.recipe import Recipe, StageSpec
from keural.train.memory.activations import Mix
from keural.train.memory.budget import best_mix, with_mix
from keural.train.memory.network import Network, network_of
from keural.train.memory.parts import ERROR, GIB, MODES, SHARDED_MODES, Layout, Memory, memory
from keural.train.memory.stage import layout_of, micro_batch_tokens, row_tokens, share_tokens
from keural.train.processes.modes import why_not_on

KEYS = ("precision", "recompute", "micro_batch_tokens", "compile")
"""What a plan chooses where a recipe is silent."""
GOOD_TOKENS, MOST_TOKENS = 8192, 16_384
"""Of a micro-batch: smaller ones are slower, larger ones were not measured."""


@dataclass(frozen=True)
class Laid:
    """A stage on GPUs."""

    stage: StageSpec
    layout: Layout
    memory: Memory
    fits: bool
    chosen: tuple[str, ...]
    """Those of `KEYS` that the recipe does not state."""

    @property
    def settings(self) -> dict[str, Any]:
        """The values of all `KEYS` in this layout."""
        way = self.layout.way
        return dict(zip(KEYS, (self.layout.precision, way.recompute, way.tokens, way.compiled), strict=True))

    def differs(self, key: str) -> bool:
        """Whether a key was chosen and is not what it is without being given."""
        value, silent = self.settings[key], getattr(self.stage.train, key)
        if key == "micro_batch_tokens" and silent is None:
            silent = share_tokens(self.stage, self.layout.gpus)
        return key in self.chosen and value != silent


def lay_out(recipe: Recipe, gpu: Gpu, gpus: int, free: bool = False) -> list[Laid]:
    """Every stage of a recipe on `gpus` cards; with `free` as if the recipe stated none of `KEYS`.

    One precision is chosen for all stages that state none: the first of `MODES` (of `SHARDED_MODES`) with which all fit, else the
    smallest.
    """
    network = network_of(recipe)
    laid: list[Laid] = []
    for precision in MODES if gpus == 1 else SHARDED_MODES:
        laid = [_best(network, stage, gpu, gpus, precision, free) for stage in recipe.stages]
        if all(one.fits for one in laid):
            break
    return laid


def check_modes(recipe: Recipe, gpus: int) -> None:
    """Refuse stated modes that cannot run on so many processes, and what a plan does not count. Raises `UserError`."""
    for stage in recipe.stages:
        if stage.lora is not None:
            raise UserError(
                f"{stage.name}: trains adapters, which a plan does not count; plan it whole with {stage.name}.lora=null"
            )
        if (reason := why_not_on(stage, gpus, recipe.spec.model)) is not None:
            raise UserError(reason)


def _best(network: Network, stage: StageSpec, gpu: Gpu, gpus: int, precision: str, free: bool) -> Laid:
    """The first layout that fits, or else the one that takes least."""
    stated = set() if free else stage.train.model_fields_set & set(KEYS)
    if stage.train.memory_gib is not None:
        stated |= {"recompute"}  # which alone goes by it
    if stage.router.scope == "micro_batch":
        stated |= {"micro_batch_tokens"}  # there it is part of the loss
    chosen = tuple(key for key in KEYS if key not in stated)
    own = stage.train.compute_dtype != "bfloat16" or stage.train.optimizer != "adamw"  # which others are not for
    if "precision" in stated or (precision != "fp32" and own):
        precision = stage.train.precision
    found: list[Laid] = []
    for layout in _layouts(network, stage, gpu, gpus, precision, stated):
        taken = memory(network, layout)
        found.append(Laid(stage, layout, taken, taken.total * ERROR <= available(stage, layout, gpu) * GIB, chosen))
        if found[-1].fits:
            return found[-1]
    return min(found, key=lambda laid: laid.memory.total)


def available(stage: StageSpec, layout: Layout, gpu: Gpu) -> float:
    """GiB of a card that a stage may take."""
    stated = stage.train.memory_gib if layout.way.recompute == "budget" else None
    return gpu.gib if stated is None else min(stated, gpu.gib)


def _layouts(network: Network, stage: StageSpec, gpu: Gpu, gpus: int, precision: str, stated: set[str]) -> Iterator[Layout]:
    """Layouts of a stage, the fastest first."""
    spec = stage.train
    modes = ["none", "selective", "budget", "full"] if spec.compute_dtype == "bfloat16" else ["none", "full"]
    if "recompute" in stated:
        modes = [spec.recompute]
    sizes = _sizes(stage, gpus, "micro_batch_tokens" in stated)
    good = min(GOOD_TOKENS, sizes[0])
    compiled = spec.compile if "compile" in stated else None
    for enough in (True, False):
        for mode in modes:
            if mode == "budget" and "recompute" not in stated and not enough:
                continue  # a small micro-batch is slower than what layers in full lose
            laid = [
                layout_of(stage, gpus, precision=precision, recompute=mode, compiled=compiled, tokens=tokens)
                for tokens in sizes
                if (tokens >= good) == enough
            ]
            yield from laid if mode != "budget" else _mixed(network, stage, gpu, laid, "recompute" in stated)


def _mixed(network: Network, stage: StageSpec, gpu: Gpu, layouts: Sequence[Layout], stated: bool) -> list[Layout]:
    """Layouts whose layers keep as much as fits, those first that have fewest layers in full; where none fits, and `stated`, all
    layers are in full.
    """
    mixes = [(layout, best_mix(network, layout, GIB * available(stage, layout, gpu))) for layout in layouts]
    found = sorted(((mix.full, layout, mix) for layout, mix in mixes if mix is not None), key=lambda each: each[0])
    if not found and stated:
        return [with_mix(layout, Mix(full=network.model.num_hidden_layers)) for layout in layouts]
    return [with_mix(layout, mix) for _, layout, mix in found]


def _sizes(stage: StageSpec, gpus: int, stated: bool) -> list[int]:
    """Tokens of a micro-batch on one GPU, the largest first."""
    if stated:
        return [micro_batch_tokens(stage, gpus)]
    row = row_tokens(stage)
    most = min(share_tokens(stage, gpus) // row, max(1, MOST_TOKENS // row))
    return [row * rows for rows in sorted({max(1, most >> power) for power in range(20)}, reverse=True)]


def remedy(recipe: Recipe, gpu: Gpu, gpus: int) -> str:
    """What would make a recipe fit that does not: other settings, more cards, or another one."""
    larger = [card for card in GPUS.values() if card.gib > gpu.gib]
    tried = [(gpu, gpus, True)]
    for card in (gpu, *larger):
        numbers = [2**power for power in range(13) if card is not gpu or 2**power > gpus]
        tried += [(card, number, free) for number in numbers for free in (False, True)]
    for card, number, free in tried:
        if not free and any(why_not_on(stage, number, recipe.spec.model) for stage in recipe.stages):
            continue
        found = lay_out(recipe, card, number, free)
        if all(laid.fits for laid in found):
            where = "it fits" if (card, number) == (gpu, gpus) else f"it fits on {number} {card.name}"
            settings = " ".join(overrides(found))
            return f"{where} with {settings}" if settings else where
    return "choose a smaller model or shorter rows"


def overrides(laid: Sequence[Laid]) -> list[str]:
    """Settings to give on a command line beside the recipe: once where all stages have the same, else stage by stage."""
    found = []
    for key in KEYS:
        values = [str(one.settings[key]).lower() for one in laid]
        differ = [one.differs(key) for one in laid]
        if any(differ) and len(set(values)) == 1 and all(key in one.chosen for one in laid):
            found.append(f"train.{key}={values[0]}")
        else:
            found += [f"{laid[i].stage.name}.train.{key}={values[i]}" for i in range(len(laid)) if differ[i]]
    return found
