"""AdamW over float32 weights whose two moments are stored in bfloat16: `train.precision: fp32-bf16m`.

In: float32 parameters (plain or sharded) with gradients. Out: changed parameters. 12 bytes per parameter with its gradient instead
of 16, and every step counts as in float32, because the weights are float32. Moments are widened chunk by chunk for the step, which
is that of `torch.optim.AdamW`, and rounded to the nearest where they are put back.

bfloat16 has steps of 1/256 to 1/128: a second moment that shrinks by less than half of that in a step would never shrink. So the
recipe refuses a second beta above 0.99.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

CHUNK = 2**26
"""Parameters whose moments are there in float32 at a time: 512 MiB of them."""


class HalfMomentAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with moments in bfloat16, which exist from the start."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.dtype == torch.float32, "master weights are float32"
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[parameter][name] = torch.zeros_like(parameter, dtype=torch.bfloat16)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._change(group, parameter)

    def _change(self, group: dict[str, Any], parameter: Any) -> None:
        state = self.state[parameter]
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        before = state["step"].clone()
        for weight, gradient, *moments in zip(*(flat(tensor).split(CHUNK) for tensor in tensors), strict=True):
            wide = [moment.float() for moment in moments]
            adamw(
                [weight], [gradient], [wide[0]], [wide[1]], [], [before.clone()],
                fused=True, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            for moment, value in zip(moments, wide, strict=True):
                moment.copy_(value)
        state["step"] += 1


def part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory; all of it where it is not sharded."""
    tensor = tensor.detach()
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def flat(tensor: Tensor) -> Tensor:
    """The same as one row."""
    return part(tensor).view(-1)
