"""What is measured when a recipe is finished: held-out accuracy, preferences, politeness, bits per byte, sample answers.

Reads the stages' model directories and held-out data, returns plain figures for `summary.json`.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from keural import microworld
from keural.data.prepared import Prepared, read_heldout_texts
from keural.errors import UserError
from keural.evaluate.generation import greedy
from keural.evaluate.tasks import bits_per_byte, exact_match, polite_rate, preference_accuracy, xz_bits_per_byte
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.pretrained.cached_step import check_cached_step
from keural.pretrained.directory import load_model
from keural.recipe import BitsPerByteSpec, ExactMatchSpec, Recipe, StageSpec
from keural.tokenizer import KeuralTokenizer, Message

LoadModel = Callable[[str], KeuralMoECausalLM]


def score(
    recipe: Recipe, out: Path, tokenizer: KeuralTokenizer, config: KeuralConfig, data: Mapping[str, Prepared]
) -> dict[str, Any]:
    """Run the recipe's evaluation on the finished stages under `out`; returns `evaluation` and `samples` of the summary."""
    loaded: dict[str, KeuralMoECausalLM] = {}

    def load(name: str) -> KeuralMoECausalLM:
        if name not in loaded:
            loaded[name] = _untrained(config, recipe.spec.seed) if name == "untrained" else _trained(out / name / "model")
        return loaded[name]

    evaluation: dict[str, Any] = {}
    if recipe.spec.evaluation.exact_match is not None:
        evaluation |= _exact_match(recipe, recipe.spec.evaluation.exact_match, tokenizer, load)
    if recipe.spec.evaluation.bits_per_byte:
        evaluation["bits_per_byte"] = [
            _bits_per_byte(recipe, spec, tokenizer, load, data) for spec in recipe.spec.evaluation.bits_per_byte
        ]
    return {"evaluation": evaluation, "samples": sample_answers(recipe, load(recipe.stages[-1].name), tokenizer)}


def _trained(directory: Path) -> KeuralMoECausalLM:
    model = load_model(directory)
    check_cached_step(model, directory)
    return model


def _untrained(config: KeuralConfig, seed: int) -> KeuralMoECausalLM:
    torch.manual_seed(seed)
    return KeuralMoECausalLM(config).eval()


def _exact_match(recipe: Recipe, spec: ExactMatchSpec, tokenizer: KeuralTokenizer, load: LoadModel) -> dict[str, Any]:
    """Held-out items and pairs on the final model, and on the model before the last DPO where there is one."""
    items = microworld.heldout_items(spec.items_per_task, recipe.spec.seed)
    pairs = microworld.heldout_pairs(spec.pairs, recipe.spec.seed)
    before = _before_last_dpo(recipe)
    figures: dict[str, dict[str, Any]] = {}
    for name in {before, recipe.stages[-1].name} - {None}:
        assert name is not None
        model = load(name)
        prompts = [[Message("user", item.prompt)] for item in items]
        answers = greedy(model, tokenizer, prompts, spec.max_new_tokens)
        korean = [answer for item, answer in zip(items, answers, strict=True) if item.language == "ko"]
        figures[name] = exact_match(answers, items) | {
            "polite_rate": polite_rate(korean, microworld.is_polite),
            "preference_accuracy": preference_accuracy(model, tokenizer, pairs),
        }
    after = figures[recipe.stages[-1].name]
    result = {key: after[key] for key in ("accuracy", "by_task", "by_language", "by_task_and_language", "preference_accuracy")}
    result |= {"items": len(items), "pairs": len(pairs), "accuracy_stderr": after["stderr"]}
    if before is None:
        return result | {"polite_rate": {"after": after["polite_rate"]}}
    earlier = figures[before]
    return result | {
        "before": {"stage": before} | {key: earlier[key] for key in ("accuracy", "by_task", "by_language", "preference_accuracy")},
        "polite_rate": {"before": earlier["polite_rate"], "after": after["polite_rate"]},
    }


def _before_last_dpo(recipe: Recipe) -> str | None:
    """The stage that the last stage starts from, when the last stage is a DPO stage."""
    last: StageSpec = recipe.stages[-1]
    return last.predecessor if last.objective == "dpo" else None


def _bits_per_byte(
    recipe: Recipe, spec: BitsPerByteSpec, tokenizer: KeuralTokenizer, load: LoadModel, data: Mapping[str, Prepared]
) -> dict[str, Any]:
    """Bits per byte of held-out text for the untrained model, the last pretraining stage and the final model, with xz beside."""
    texts = measured_texts(spec, data[spec.stage])
    length = recipe.stage(spec.stage).data.sequence_length
    pretrained = [stage.name for stage in recipe.stages if stage.objective == "next_token"][-1:]
    models = ["untrained", *pretrained, recipe.stages[-1].name]
    return {
        "name": spec.name,
        "language": spec.language,
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "models": {name: bits_per_byte(load(name), tokenizer, texts, length)["bits_per_byte"] for name in models},
        "xz": xz_bits_per_byte(texts),
    }


def measured_texts(spec: BitsPerByteSpec, prepared: Prepared) -> list[str]:
    """The held-out texts of a measure, as many as fit into its `max_bytes`. Raises `UserError` when none does."""
    texts = read_heldout_texts(prepared, spec.language)
    kept = _limited(texts, spec.max_bytes)
    if not kept:
        raise UserError(
            f"evaluation.bits_per_byte {spec.name!r}: the first held-out document has {len(texts[0].encode()):,} bytes, more than "
            f"max_bytes {spec.max_bytes:,}; raise it"
        )
    return kept


def _limited(texts: list[str], max_bytes: int) -> list[str]:
    """The first texts that fit into `max_bytes` of UTF-8."""
    kept, size = [], 0
    for text in texts:
        size += len(text.encode())
        if size > max_bytes:
            break
        kept.append(text)
    return kept


def sample_answers(recipe: Recipe, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> list[dict[str, str]]:
    """Greedy answers of `model` to the recipe's sample prompts."""
    if not recipe.spec.chat.samples:
        return []
    system = [Message("system", recipe.spec.chat.system)] if recipe.spec.chat.system else []
    prompts = [[*system, Message("user", prompt)] for prompt in recipe.spec.chat.samples]
    answers = greedy(model, tokenizer, prompts, min(recipe.spec.chat.max_new_tokens, 64))
    return [
        {"language": "ko" if re.search("[가-힣]", prompt) else "en", "prompt": prompt, "answer": answer}
        for prompt, answer in zip(recipe.spec.chat.samples, answers, strict=True)
    ]
