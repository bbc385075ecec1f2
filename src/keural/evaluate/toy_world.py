"""The toy world: held-out questions and preference pairs, put to a recipe's model before its first step and after each stage.

In: a `Bench` and the settings under `evaluation.exact_match`. Out: the table of all stages (`stages`), and figures of the final
model and of the one before the last preference stage, whose own stand under `before`.

Models that were trained on chats are asked in a chat. Those that read documents alone are asked as such models are: the question
stands at the beginning of a document, in the words in which their documents ask, and what they write up to its end is the answer.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from keural import microworld
from keural.evaluate.bench import Bench, Figures
from keural.evaluate.comparison.stages import complete
from keural.evaluate.generation import continuations
from keural.evaluate.measures import exact_match, is_correct, polite_rate
from keural.evaluate.models import UNTRAINED
from keural.evaluate.results.records import ItemResult, TaskResults
from keural.evaluate.results.store import Header
from keural.evaluate.scoring.network import Network
from keural.evaluate.statistics.summary import summarize
from keural.evaluate.tasks.asking import answer_after
from keural.evaluate.tasks.items import Likelihood
from keural.files import fingerprint
from keural.recipe import OBJECTIVES, ExactMatchSpec
from keural.tokenizer import KeuralTokenizer, Message, render_prompt

CHANCE_OF_PAIRS = 0.5
PREFERENCES = "preferences"


@dataclass(frozen=True)
class ToyTask:
    """Held-out items of one family in one language: questions to answer, or pairs to choose from."""

    family: str
    language: str
    items: tuple[microworld.Item, ...] | tuple[microworld.Pair, ...]

    @property
    def name(self) -> str:
        """What results and tables call it."""
        return f"toy_{self.family}_{self.language}"

    @property
    def is_of_pairs(self) -> bool:
        """Whether its items are preference pairs."""
        return self.family == PREFERENCES


def toy_tasks(spec: ExactMatchSpec, seed: int) -> list[ToyTask]:
    """Every family in both languages, then the preference pairs. Raises `UserError` where there are not so many held-out items."""
    items = microworld.heldout_items(spec.items_per_task, seed)
    pairs = microworld.heldout_pairs(spec.pairs, seed)
    asked = [
        ToyTask(family, language, tuple(item for item in items if (item.task, item.language) == (family, language)))
        for family in microworld.TASKS
        for language in microworld.LANGUAGES
    ]
    asked += [
        ToyTask(PREFERENCES, language, tuple(pair for pair in pairs if pair.language == language))
        for language in microworld.LANGUAGES
    ]
    return [task for task in asked if task.items]


def measure(bench: Bench, spec: ExactMatchSpec) -> Figures:
    """The table of all finished stages; with the last one finished also the figures of the final model."""
    if not bench.finished:
        return {}
    tasks = toy_tasks(spec, bench.recipe.spec.seed)
    found = {name: _results(bench, name, tasks, spec.max_new_tokens) for name in (UNTRAINED, *bench.finished)}
    figures = _table(bench, found)
    if bench.final not in found:
        return figures
    after, before = _figures(found[bench.final].values()), bench.before_preferences
    figures |= {name: after[name] for name in ("accuracy", "by_task", "by_language", "by_task_and_language", "preference_accuracy")}
    figures |= {"items": after["n"], "pairs": spec.pairs, "accuracy_stderr": after["stderr"]}
    figures["polite_rate"] = {"after": after["polite_rate"]}
    if before is not None:
        earlier = _figures(found[before].values())
        kept = {name: earlier[name] for name in ("accuracy", "by_task", "by_language", "preference_accuracy")}
        figures["before"] = {"stage": before} | kept
        figures["polite_rate"]["before"] = earlier["polite_rate"]
    return figures


def _table(bench: Bench, found: Mapping[str, Mapping[str, TaskResults]]) -> Figures:
    """What every model scored on every task, and what changed from the one that it starts from."""
    stages = {
        name: {"tasks": {one.task: summarize(one, path).to_json() for path, one in results.items()}}
        for name, results in found.items()
    }
    everything = {path: one for results in found.values() for path, one in results.items()}
    predecessors = {name: bench.recipe.stage(name).predecessor or UNTRAINED for name in bench.finished}
    pretrained = [name for name in bench.finished if reads_documents(bench, name)][-1:]
    return complete({"stages": stages}, everything.__getitem__, predecessors, *pretrained)


def reads_documents(bench: Bench, name: str) -> bool:
    """Whether a stage's model is asked as those are that were trained on documents."""
    return name == UNTRAINED or OBJECTIVES[bench.recipe.stage(name).objective].store == "documents"


def _results(bench: Bench, name: str, tasks: Sequence[ToyTask], max_new_tokens: int) -> dict[str, TaskResults]:
    """What a model answers to every task, by the file that has it; computed where it is not there from an earlier time."""
    in_chat, found = not reads_documents(bench, name), {}
    identity = bench.identity(name, "chat" if in_chat else "bos")
    for task in tasks:
        settings = {"task": task.name, "items": [_key(item) for item in task.items]}
        header = Header(
            model=identity,
            task=task.name,
            language=task.language,
            kind="pair" if task.is_of_pairs else "generate",
            chance=CHANCE_OF_PAIRS if task.is_of_pairs else 0.0,
            digest=fingerprint(settings if task.is_of_pairs else settings | {"max_new_tokens": max_new_tokens}),
            size=len(task.items),
        )
        answers = partial(_choose if task.is_of_pairs else _answer, bench, name, task, in_chat, max_new_tokens)
        path, results = bench.kept(header, answers)
        found[path] = results
    return found


def _key(item: microworld.Item | microworld.Pair) -> list[Any]:
    """What makes an item the one that it is."""
    if isinstance(item, microworld.Item):
        return [item.prompt, list(item.answers)]
    return [item.question, item.chosen, item.rejected]


def _identity(item: microworld.Item | microworld.Pair) -> str:
    return fingerprint(_key(item))[:16]


def _answer(bench: Bench, name: str, task: ToyTask, in_chat: bool, longest: int) -> list[ItemResult]:
    """Greedy answers to questions, and whether each equals an accepted one."""
    model, tokenizer = bench.model(name), bench.tokenizer
    items = [item for item in task.items if isinstance(item, microworld.Item)]
    asked = [item.prompt if in_chat else microworld.as_document(item.prompt, item.language) for item in items]
    prompts = [_prompt(tokenizer, text, in_chat) for text in asked]
    answers = continuations(model, prompts, {tokenizer.im_end_id, tokenizer.eos_id}, tokenizer.pad_id, longest)
    found = []
    for item, question, prompt, ids in zip(items, asked, prompts, answers, strict=True):
        given = tokenizer.decode(ids).strip()
        details = {"accepted": list(item.answers), "polite": microworld.is_polite(given) if item.language == "ko" else None}
        score, tokens = float(is_correct(given, item)), len(prompt) + len(ids)
        found.append(ItemResult(_identity(item), None, score, question, item.answers[0], given, None, tokens, details))
    return found


def _choose(bench: Bench, name: str, task: ToyTask, in_chat: bool, longest: int) -> list[ItemResult]:
    """Which side of each pair is the more probable one, by the sum over its tokens and its end; a tie counts as wrong."""
    model, tokenizer = bench.model(name), bench.tokenizer
    pairs = [pair for pair in task.items if isinstance(pair, microworld.Pair)]
    asked = [[_with_answer(tokenizer, pair, answer, in_chat) for answer in (pair.chosen, pair.rejected)] for pair in pairs]
    answered = dict(each for batch in Network(model, tokenizer).likelihoods(asked) for each in batch)
    found = []
    for index, pair in enumerate(pairs):
        sides = answered[index][0].total, answered[index][1].total
        tokens = sum(len(request.context) + len(request.continuation) for request in asked[index])
        question = pair.question if in_chat else microworld.as_document(pair.question, pair.language)
        given = pair.chosen if sides[0] > sides[1] else pair.rejected
        score = float(sides[0] > sides[1])
        found.append(ItemResult(_identity(pair), None, score, question, pair.chosen, given, sides, tokens))
    return found


def _prompt(tokenizer: KeuralTokenizer, text: str, in_chat: bool) -> list[int]:
    return render_prompt(tokenizer, [Message("user", text)]) if in_chat else [tokenizer.bos_id, *tokenizer.encode(text)]


def _with_answer(tokenizer: KeuralTokenizer, pair: microworld.Pair, answer: str, in_chat: bool) -> Likelihood:
    """What is asked of an answer and its end after the question."""
    if in_chat:
        context, following = answer_after(tokenizer, pair.prompt, answer)
    else:
        context = _prompt(tokenizer, microworld.as_document(pair.question, pair.language), in_chat)
        following = [*tokenizer.encode(f" {answer}"), tokenizer.eos_id]
    return Likelihood(tuple(context), tuple(following))


@dataclass(frozen=True)
class _Asked:
    """An item's family, language and accepted answers, as `exact_match` wants them."""

    task: str
    language: str
    answers: Sequence[str]


def _figures(found: Collection[TaskResults]) -> Mapping[str, Any]:
    """A model's figures over all tasks."""
    questions = [(results, item) for results in found if results.kind == "generate" for item in results.items]
    family = {results.task: results.task.removeprefix("toy_").rpartition("_")[0] for results in found}
    asked = [_Asked(family[results.task], results.language, item.details["accepted"]) for results, item in questions]
    pairs = [item.score for results in found if results.kind == "pair" for item in results.items]
    korean = [item.given for results, item in questions if results.language == "ko"]
    return exact_match([item.given for _, item in questions], asked) | {
        "polite_rate": polite_rate(korean, microworld.is_polite),
        "preference_accuracy": sum(pairs) / len(pairs),
    }
