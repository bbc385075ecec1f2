"""The GPUs that a plan can be made for.

In: what somebody calls one. Out: its memory and speed, or a `UserError` that names the nearest.
"""

from dataclasses import dataclass

from keural.errors import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    """A card: its name, the GiB of memory that a program sees, dense products per second in bfloat16 and float32, and bytes per
    second in one direction to cards of its node (`nvlink`) and by its adapter to other nodes (`network`).
    """

    name: str
    gib: float
    bfloat16_flops: float
    float32_flops: float
    nvlink: float
    network: float

    def flops(self, dtype: str) -> float:
        """FLOP/s of matrix products in `bfloat16` or `float32`, as the maker states them."""
        return self.bfloat16_flops if dtype == "bfloat16" else self.float32_flops


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 139.0, 989.5e12, 67e12, 450e9, 50e9),
        Gpu("h100", 79.2, 989.5e12, 67e12, 450e9, 50e9),
        Gpu("a100", 79.1, 312e12, 19.5e12, 300e9, 25e9),
    )
}
"""H100 and A100 with 80 GB, all three as SXM. Memory of the H100 and the H200 as CUDA reported it (`benchmarks/gpu_*`); links as
`keural.plan.communication` states them."""


def find_gpu(name: str) -> Gpu:
    """The card called `name`. Raises `UserError`."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: not known{nearest(name.lower(), GPUS)}; there are {', '.join(GPUS)}")
    return GPUS[name.lower()]
