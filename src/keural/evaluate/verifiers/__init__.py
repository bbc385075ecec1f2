"""Whether an answer does what it was told: instructions whose following a program can decide, in English and Korean.

In: an answer, and instructions by name with arguments. Out: one verdict each, strict and loose. No model judges anything.
"""

from keural.evaluate.verifiers.base import Instruction, Registry, Verdicts, parse_instructions, verdicts
from keural.evaluate.verifiers.ifeval import IFEVAL
from keural.evaluate.verifiers.ifeval_ko import IFEVAL_KO
from keural.evaluate.verifiers.korean import KOREAN

REGISTRIES: dict[str, Registry] = {"ifeval": IFEVAL, "ifeval_ko": IFEVAL_KO, "ko_instructions": KOREAN}
"""Kinds of instructions by the name that a task gives its verifier."""

__all__ = ["IFEVAL", "IFEVAL_KO", "KOREAN", "REGISTRIES", "Instruction", "Registry", "Verdicts", "parse_instructions", "verdicts"]
