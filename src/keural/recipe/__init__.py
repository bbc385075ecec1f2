"""Recipes: what a run is made of, as strict typed objects read from YAML. Import specs from here."""

from keural.recipe.base import VERSION, Part, Spec, length_of, mark_of, neutral, not_for, validate
from keural.recipe.data import (
    CleaningSpec,
    DataSpec,
    DecontaminateSpec,
    ExecutorSpec,
    GateAction,
    LicensesSpec,
    MixingSpec,
    SourceSpec,
    StoreSpec,
)
from keural.recipe.evaluation import BitsPerByteSpec, ChatSpec, EvaluationSpec, ExactMatchSpec
from keural.recipe.load import Recipe, RecipeSpec, load_recipe, parse_duration
from keural.recipe.lora import LoraSpec, Target
from keural.recipe.model import ModelSpec
from keural.recipe.objectives import OBJECTIVES, PREFERENCE_LOSSES, STORES, Objective, ObjectiveKind, StoreKind, StoreShape, Unit
from keural.recipe.optimizer import MuonSpec
from keural.recipe.tokenizer import TokenizerSpec
from keural.recipe.training import ChecksSpec, DpoSpec, RouterSpec, SftSpec, StageSpec, TrainSpec

__all__ = [
    "OBJECTIVES",
    "PREFERENCE_LOSSES",
    "STORES",
    "VERSION",
    "BitsPerByteSpec",
    "ChatSpec",
    "ChecksSpec",
    "CleaningSpec",
    "DataSpec",
    "DecontaminateSpec",
    "DpoSpec",
    "EvaluationSpec",
    "ExactMatchSpec",
    "ExecutorSpec",
    "GateAction",
    "LicensesSpec",
    "LoraSpec",
    "MixingSpec",
    "ModelSpec",
    "MuonSpec",
    "Objective",
    "ObjectiveKind",
    "Part",
    "Recipe",
    "RecipeSpec",
    "RouterSpec",
    "SftSpec",
    "SourceSpec",
    "Spec",
    "StageSpec",
    "StoreKind",
    "StoreShape",
    "StoreSpec",
    "Target",
    "TokenizerSpec",
    "TrainSpec",
    "Unit",
    "length_of",
    "load_recipe",
    "mark_of",
    "neutral",
    "not_for",
    "parse_duration",
    "validate",
]
