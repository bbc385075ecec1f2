"""What is published of the training of the 14.83B model, to stand beside a plan.

In: nothing. Out: the stages as the model card has them, with what arithmetic on them gives.
"""

from typing import Any

GPUS, GPU = 2, "h200"
TOKENS_PER_SECOND = 12_000
"""Of both cards together: 22 s per step of 262,144 tokens."""
BYTES_PER_PARAMETER = 8
"""bfloat16 weights, gradients and both moments, rounded to the nearest: steps below a bfloat16 weight's spacing are lost."""

STAGES: dict[str, dict[str, Any]] = {
    "pretrain-1": {"steps": 100_000, "tokens_claimed": 50e9, "tokens": 100_000 * 262_144, "hours": None},
    "pretrain-2": {"steps": 20_000, "tokens_claimed": 19e9, "tokens": 20_000 * 262_144, "hours": None},
    "sft-1": {"steps": 18_000, "tokens_claimed": 0.71e9, "tokens": 18_000 * 262_144, "hours": None},
    "dpo-1": {"steps": 6_927, "tokens_claimed": None, "tokens": 6_927 * 64 * 2 * 1024, "hours": None},
    "sft-2": {"steps": 11_112, "tokens_claimed": 7.63e9, "tokens": 11_112 * 262_144, "hours": 56.71},
    "sft-3": {"steps": 36_737, "tokens_claimed": 17.3e9, "tokens": 36_737 * 131_072, "hours": None},
    "dpo-2": {"steps": 7_590, "tokens_claimed": None, "tokens": 7_590 * 64 * 2 * 1024, "hours": 85.28},
}
"""`steps` are the stage's own (the card counts SFT 2 and 3 and the second pretraining from an earlier start), `tokens` positions of
padded rows; `hours` as stated, None where nothing is.
"""


def beside() -> dict[str, Any]:
    """The published run as data: hours that are not stated follow from the stated tokens per second."""
    stages = []
    for name, stage in STAGES.items():
        stated = stage["hours"] is not None
        hours = stage["hours"] if stated else round(stage["tokens"] / TOKENS_PER_SECOND / 3600, 1)
        stages.append({"name": name, **stage, "hours": hours, "hours_stated": stated, "gpu_hours": round(GPUS * hours, 1)})
    return {
        "gpu": GPU,
        "gpus": GPUS,
        "tokens_per_s": TOKENS_PER_SECOND,
        "precision": "bfloat16, rounded to the nearest",
        "bytes_per_parameter": BYTES_PER_PARAMETER,
        "stages": stages,
        "gpu_hours": round(sum(stage["gpu_hours"] for stage in stages), 1),
    }
