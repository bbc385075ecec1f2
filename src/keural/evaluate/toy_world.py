"""The toy world's tasks: held-out questions and preference pairs, on the final model and before the last preference stage.

In: a `Bench` and the settings under `evaluation.exact_match`. Out: figures; those before the last preference stage stand under
`before`, with the name of their stage.
"""

from keural import microworld
from keural.evaluate.bench import Bench, Figures, before_and_after
from keural.evaluate.generation import greedy
from keural.evaluate.measures import exact_match, polite_rate, preference_accuracy
from keural.model import KeuralMoECausalLM
from keural.recipe import ExactMatchSpec
from keural.tokenizer import Message


def questions(bench: Bench, spec: ExactMatchSpec) -> Figures:
    """Greedy answers to held-out questions: exact match by task and language, and the share of polite Korean answers."""
    items = microworld.heldout_items(spec.items_per_task, bench.recipe.spec.seed)
    prompts = [[Message("user", item.prompt)] for item in items]

    def measure(model: KeuralMoECausalLM) -> Figures:
        answers = greedy(model, bench.tokenizer, prompts, spec.max_new_tokens)
        korean = [answer for item, answer in zip(items, answers, strict=True) if item.language == "ko"]
        return exact_match(answers, items) | {"polite_rate": polite_rate(korean, microworld.is_polite)}

    before, after = before_and_after(bench, measure)
    result = {name: after[name] for name in ("accuracy", "by_task", "by_language", "by_task_and_language")}
    result |= {"items": len(items), "accuracy_stderr": after["stderr"], "polite_rate": {"after": after["polite_rate"]}}
    if before is not None:
        kept = {name: before[name] for name in ("accuracy", "by_task", "by_language")}
        result["before"] = {"stage": bench.before_preferences} | kept
        result["polite_rate"]["before"] = before["polite_rate"]
    return result


def preferences(bench: Bench, spec: ExactMatchSpec) -> Figures:
    """Held-out preference pairs: how often the preferred answer is the more probable one."""
    pairs = microworld.heldout_pairs(spec.pairs, bench.recipe.spec.seed)

    def measure(model: KeuralMoECausalLM) -> Figures:
        return {"preference_accuracy": preference_accuracy(model, bench.tokenizer, pairs)}

    before, after = before_and_after(bench, measure)
    return after | {"pairs": len(pairs)} | ({"before": before} if before else {})
