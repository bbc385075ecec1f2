"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math


def learning_rate(step: int, *, steps: int, peak: float, minimum: float, warmup_steps: int) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then a half cosine that reaches `minimum` at the last step.

    Warm-up follows the published training code: step s gets ``peak * (s + 1) / warmup_steps``, so the first step already moves.

    Args:
        step: 0 <= step < steps.
        steps: optimizer steps of the stage.
        peak: highest learning rate.
        minimum: learning rate of the last step.
        warmup_steps: steps of the linear part, fewer than `steps`.
    """
    assert 0 <= step < steps
    assert warmup_steps < steps
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    decay_steps = steps - 1 - warmup_steps
    progress = (step - warmup_steps) / decay_steps if decay_steps else 0.0
    return minimum + 0.5 * (peak - minimum) * (1 + math.cos(math.pi * progress))
