"""The objectives: arithmetic on the log-probabilities of labels.

Each is an `Objective` in the registry `OBJECTIVES`. It says how many items (labelled tokens, or pairs) a batch has and gives
the sum of the loss over the items of one forward pass; the loop divides by the number of items of the whole optimizer step,
over all ranks and micro-batches, so that the result does not depend on how the step is cut.
"""

from collections.abc import Callable

from keural.recipe import StageSpec
from keural.train.objectives.base import Objective
from keural.train.objectives.next_token import NextToken
from keural.train.objectives.preference import Dpo

OBJECTIVES: dict[str, Callable[[StageSpec], Objective]] = {
    "next_token": lambda stage: NextToken(),
    "sft": lambda stage: NextToken(),
    "dpo": lambda stage: Dpo(stage.dpo.beta),
}
