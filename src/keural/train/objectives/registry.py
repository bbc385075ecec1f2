"""The losses of the objectives: arithmetic on the log-probabilities of labels.

Each is an `Objective` under its name in the recipe; what else there is to say of it stands in `keural.recipe.objectives`. It says
how many labels or pairs a batch has and gives the sum of the loss over those of one forward pass; the loop divides by the number
of the whole optimizer step, over all ranks and micro-batches, so that the result does not depend on how the step is cut.
"""

from collections.abc import Callable

from keural.recipe import StageSpec
from keural.train.objectives.base import Objective
from keural.train.objectives.labelled import Kto
from keural.train.objectives.next_token import NextToken
from keural.train.objectives.preference import Dpo

LOSSES: dict[str, Callable[[StageSpec], Objective]] = {
    "next_token": lambda stage: NextToken(),
    "sft": lambda stage: NextToken(),
    "dpo": lambda stage: Dpo(stage.dpo),
    "kto": lambda stage: Kto(stage.kto),
}
"""Made from the stage's settings, one for each of `keural.recipe.OBJECTIVES`."""
