"""Tasks whose answers are written: the kind `generate`.

In: items of a benchmark. Out: for each item one request a sample, and from the texts a score: the share of samples whose extracted
answer is right, whose instructions are all followed, or whose program passes. Every sample's text is kept.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from keural.data.records import EvaluationItem
from keural.errors import UserError
from keural.evaluate.generated.code import pass_at_k, run_program
from keural.evaluate.generated.extraction import extract, is_right
from keural.evaluate.generated.programs import program_of
from keural.evaluate.generated.settings import GenerationSpec
from keural.evaluate.results.records import ItemResult
from keural.evaluate.tasks.asking import Asking
from keural.evaluate.tasks.choice import values_of
from keural.evaluate.tasks.items import Draft, Item, Unusable, Writing, Written
from keural.evaluate.tasks.spec import TaskSpec
from keural.evaluate.tasks.template import fill
from keural.evaluate.verifiers import REGISTRIES, Instruction, parse_instructions, verdicts
from keural.limits import LARGEST_SEED
from keural.parsing import Malformed, parse_json

ANSWERS_AT_ONCE = 8, 64
"""On a CPU, and on a device."""


def draft(spec: TaskSpec, record: EvaluationItem) -> Draft:
    """What is asked of a record. Raises `Unusable` where nothing says what a right answer is."""
    values = values_of(spec, record)
    try:
        question = fill(spec.question, values)
    except ValueError as error:
        raise Unusable("template", str(error)) from error
    settings = settings_of(spec)
    if settings.verifier is not None:
        instructions_of(settings, values, record.where)
    elif settings.code:
        if not all(values.get(name) for name in ("program", "test", "entry_point")):
            raise Unusable("no_test", "a row has a program's beginning, a test and the name of what is tested")
    elif not record.answers:
        raise Unusable("no_answer")
    plain = settings.verifier is None and not settings.code
    return Draft(question, record.answers, values=values, shown=f"{question}{spec.delimiter}{record.answers[0]}" if plain else None)


def settings_of(spec: TaskSpec) -> GenerationSpec:
    """How the task's answers are written and judged."""
    assert spec.generation is not None, "a task of kind generate has them"
    return spec.generation


def instructions_of(settings: GenerationSpec, values: Any, where: str) -> tuple[Instruction, ...]:
    """The instructions of an item. Raises `Unusable` for those that cannot be judged."""
    try:
        kinds, arguments = (parse_json(values[name]) for name in ("instructions", "arguments"))
        if not isinstance(kinds, list) or not isinstance(arguments, list) or not kinds:
            raise Unusable("no_instructions", where)
        return parse_instructions(REGISTRIES[str(settings.verifier)], kinds, arguments, where)
    except (KeyError, Malformed) as error:
        raise Unusable("no_instructions", where) from error
    except UserError as error:
        raise Unusable("bad_instructions", str(error)) from error


def requests(spec: TaskSpec, item: Item, asking: Asking) -> tuple[list[Writing], dict[str, Any]]:
    """One request a sample. Raises `Unusable` where the prompt leaves no room for an answer."""
    settings, ids = settings_of(spec), asking.prompt(item.prompt)
    if len(ids) >= asking.context_length:
        raise Unusable("too_long", f"{len(ids):,} tokens")
    details = {"room": asking.context_length - len(ids)} if len(ids) + settings.max_new_tokens > asking.context_length else {}
    return [
        Writing(
            tuple(ids),
            settings.max_new_tokens,
            tuple(settings.stop),
            settings.temperature,
            settings.top_p,
            _seed(settings.seed, item.id, sample),
        )
        for sample in range(settings.samples)
    ], details


def _seed(seed: int, item: str, sample: int) -> int:
    """A seed of its own for each sample, whatever else is asked in the same run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{item}/{sample}".encode()).digest()[:8], "big") % LARGEST_SEED


def answer(network: Any, groups: Sequence[Sequence[Writing]]) -> Iterator[list[tuple[int, list[Written]]]]:
    """The answers of each group, as soon as all of it are there. Raises `UserError` where the network fails."""
    from keural.evaluate.generated.writing import write_answers  # torch comes with it

    flat = [(number, place, one) for number, group in enumerate(groups) for place, one in enumerate(group)]
    found: list[list[Written | None]] = [[None] * len(group) for group in groups]
    experts = network.model.config._experts_implementation
    try:
        for index, written in write_answers(_slots(network), network.tokenizer, [one for _, _, one in flat]):
            number, place, _ = flat[index]
            found[number][place] = written
            if all(found[number]):
                yield [(number, [each for each in found[number] if each is not None])]
    finally:
        network.model.config._experts_implementation = experts


_SLOTS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Of the networks that there are; one that was given back takes its memory with it."""


def _slots(network: Any) -> Any:
    """The network's slots for generation, made once: they count in its layers."""
    from keural.serve.batching.transformers_slots import TransformersSlots

    if network not in _SLOTS:
        _SLOTS[network] = TransformersSlots(network.model, ANSWERS_AT_ONCE[network.model.device.type != "cpu"])
    return _SLOTS[network]


def judge(spec: TaskSpec, item: Item, asked: Sequence[Writing], found: Sequence[Written], details: dict[str, Any]) -> ItemResult:
    """The item's score by the task's first way of judging; the others', and every sample, among the details."""
    settings = settings_of(spec)
    texts = [written.text for written in found]
    kind = _of_programs if settings.code else _of_instructions if settings.verifier else _of_answers
    scores, given, more = kind(settings, item, texts)
    return ItemResult(
        id=item.id,
        cluster=item.cluster,
        score=next(iter(scores.values())),
        question=item.prompt,
        expected="" if settings.code or settings.verifier else item.choices[0],
        given=given,
        logprobs=None,
        tokens=len(asked[0].prompt_ids) + sum(written.tokens for written in found),
        details={
            "scores": scores,
            "answers": texts,
            "ends": [written.end for written in found],
            "written_tokens": [written.tokens for written in found],
            **more,
            **details,
        },
    )


Judged = tuple[dict[str, float], str, dict[str, Any]]
"""Scores by name, the first the item's; what was answered; more details."""


def _of_answers(settings: GenerationSpec, item: Item, texts: Sequence[str]) -> Judged:
    extracted = {way.name: [extract(way, text) for text in texts] for way in settings.extraction}
    scores = {
        name: sum(is_right(settings.normalization, each, item.choices) for each in answers) / len(texts)
        for name, answers in extracted.items()
    }
    return scores, next(iter(extracted.values()))[0], {"extracted": extracted}


def _of_instructions(settings: GenerationSpec, item: Item, texts: Sequence[str]) -> Judged:
    instructions = instructions_of(settings, item.values, item.id)
    judged = [verdicts(REGISTRIES[str(settings.verifier)], instructions, text) for text in texts]
    scores = {
        "strict": sum(each.all_strict for each in judged) / len(texts),
        "loose": sum(each.all_loose for each in judged) / len(texts),
        "instructions_strict": sum(sum(each.strict) for each in judged) / (len(texts) * len(instructions)),
        "instructions_loose": sum(sum(each.loose) for each in judged) / (len(texts) * len(instructions)),
    }
    verdict = {"strict": [list(each.strict) for each in judged], "loose": [list(each.loose) for each in judged]}
    return scores, texts[0], {"instructions": [each.kind for each in instructions], "followed": verdict}


def _of_programs(settings: GenerationSpec, item: Item, texts: Sequence[str]) -> Judged:
    outcomes = [run_program(program_of(item.values, text)) for text in texts]
    passed = sum(outcome.passed for outcome in outcomes)
    scores = {f"pass@{k}": pass_at_k(len(texts), passed, k) for k in sorted(settings.pass_at)}
    return scores, texts[0], {"passed": [outcome.passed for outcome in outcomes], "why": [outcome.why for outcome in outcomes]}
