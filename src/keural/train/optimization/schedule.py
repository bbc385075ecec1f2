"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math


def learning_rate(
    step: int, *, steps: int, peak: float, minimum: float, warmup_steps: int, decay: str = "cosine", decay_share: float = 1.0
) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, constant, then a fall that reaches `minimum` at the last step.

    Warm-up follows the published training code: step s gets ``peak * (s + 1) / warmup_steps``, so the first step already moves.

    Args:
        step: 0 <= step < steps.
        steps: optimizer steps of the stage.
        peak: highest learning rate.
        minimum: learning rate of the last step.
        warmup_steps: steps of the linear part, fewer than `steps`.
        decay: the form of the fall: `cosine`, a half one, or `linear`.
        decay_share: share of the steps after the warm-up in which it falls; with 1 there is no constant part.
    """
    assert 0 <= step < steps
    assert warmup_steps < steps
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    after = steps - 1 - warmup_steps
    decay_steps = max(min(1, after), round(after * decay_share))  # a share of less than a step is the last one
    fallen = max(0, step - (steps - 1 - decay_steps))
    progress = fallen / decay_steps if decay_steps else 0.0
    left = 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return minimum + (peak - minimum) * left
