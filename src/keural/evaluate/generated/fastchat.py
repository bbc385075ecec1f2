"""MT-Bench and LogicKor: two-turn answers for a judge elsewhere, in FastChat's files, and its judgements read back.

In: questions as published, a model. Out: answers as JSON lines (`question_id`, `model_id`, `choices` with `turns`); judgements
become mean scores with intervals, by turn and category. No judge is here: who judges, and how, belongs beside the figures.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keural.errors import UserError, quoted
from keural.evaluate.generated.kind import answer
from keural.evaluate.statistics.intervals import share_interval
from keural.evaluate.tasks.asking import Asking
from keural.evaluate.tasks.items import Writing, Written
from keural.files import read_text, write_atomic
from keural.parsing import Malformed, parse_json
from keural.tokenizer import Message, render_prompt

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Of MT-Bench's categories, as FastChat answers them; every other category is answered greedily."""
MAX_NEW_TOKENS = 1024
MOST_SCORE = 10.0


@dataclass(frozen=True)
class Question:
    """One question with its turns."""

    id: int | str
    category: str
    turns: tuple[str, ...]


def read_questions(path: Path) -> list[Question]:
    """Questions of MT-Bench (`question_id`, `turns`) or LogicKor (`id`, `questions`), one JSON object a line.

    Raises `UserError` naming the line that is none, and for a number that is given twice.
    """
    found: dict[int | str, Question] = {}
    for place, row in _rows(path):
        number = row.get("question_id", row.get("id"))
        turns = row.get("turns", row.get("questions"))
        are_turns = isinstance(turns, list) and turns and all(isinstance(turn, str) and turn for turn in turns)
        if not isinstance(number, int | str) or isinstance(number, bool) or not are_turns:
            raise UserError(f"{path}:{place}: no question: it has neither question_id and turns nor id and questions")
        if number in found:
            raise UserError(f"{path}:{place}: question {number} stands there twice")
        found[number] = Question(number, str(row.get("category", "")), tuple(turns or ()))
    if not found:
        raise UserError(f"{path}: holds no question")
    return list(found.values())


def write_chats(
    network: Any, asking: Asking, questions: Sequence[Question], max_new_tokens: int = MAX_NEW_TOKENS, seed: int = 0
) -> list[tuple[Written, ...]]:
    """Answer the first turns of all questions, then the second with the model's own first answer before it, and so on.

    Raises `UserError` where a chat leaves no room for an answer.
    """
    chats: list[list[Message]] = [[Message("system", asking.system)] if asking.system else [] for _ in questions]
    found: list[list[Written]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        open_chats = [number for number, question in enumerate(questions) if turn < len(question.turns)]
        asked = []
        for number in open_chats:
            chats[number].append(Message("user", questions[number].turns[turn]))
            asked.append((_writing(asking, questions[number], chats[number], turn, max_new_tokens, seed),))
        for batch in answer(network, asked):
            for place, (written,) in batch:
                found[open_chats[place]].append(written)
                chats[open_chats[place]].append(Message("assistant", written.text))
    return [tuple(each) for each in found]


def _writing(asking: Asking, question: Question, chat: Sequence[Message], turn: int, max_new_tokens: int, seed: int) -> Writing:
    ids = render_prompt(asking.tokenizer, chat)
    if len(ids) >= asking.context_length:
        raise UserError(
            f"question {question.id}, turn {turn + 1}: {len(ids):,} tokens, the model's context is {asking.context_length:,}; "
            "give fewer --max-new-tokens, so that the first answers are shorter"
        )
    digest = hashlib.sha256(f"{seed}/{question.id}/{turn}".encode()).digest()
    return Writing(
        tuple(ids), max_new_tokens, temperature=TEMPERATURES.get(question.category, 0.0), seed=int.from_bytes(digest[:6], "big")
    )


def write_answers_file(path: Path, model: str, questions: Sequence[Question], answers: Sequence[Sequence[Written]]) -> None:
    """FastChat's answer file: a line for each question, written whole or not at all. An answer's id follows from its content."""
    lines = []
    for question, written in zip(questions, answers, strict=True):
        turns = [each.text for each in written]
        digest = hashlib.sha256(json.dumps([model, question.id, turns]).encode("utf-8", "surrogatepass")).hexdigest()
        row = {
            "question_id": question.id,
            "answer_id": digest[:22],
            "model_id": model,
            "choices": [{"index": 0, "turns": turns}],
            "category": question.category,
            "ends": [each.end for each in written],
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))


@dataclass(frozen=True)
class Judged:
    """The mean of some judgements, between 0 and 10, with its 95% interval; questions are what is independent."""

    mean: float
    low: float
    high: float
    judgements: int
    questions: int


@dataclass(frozen=True)
class Judgements:
    """What a judge said of one model."""

    model: str
    overall: Judged
    by_turn: Mapping[int, Judged]
    by_category: Mapping[str, Judged]
    unjudged: int
    """Judgements without a score: FastChat writes -1 where it found none in the judge's words."""


@dataclass(frozen=True)
class _Score:
    model: str
    question: int | str
    turn: int
    score: float
    category: str


def read_judgements(path: Path, categories: Mapping[int | str, str] | None = None) -> list[Judgements]:
    """Judgements of FastChat (`gpt-4_single.jsonl`) or LogicKor's evaluator, by model in the order of their names.

    Args:
        path: one JSON object a line.
        categories: of questions, where the file does not say them.

    Raises:
        UserError: naming the line, for one that is no judgement of single answers; and where no judgement has a score.
    """
    scores = [score for place, row in _rows(path) for score in _scores(path, place, row, categories or {})]
    found = []
    for model in sorted({score.model for score in scores}):
        mine = [score for score in scores if score.model == model]
        judged = [score for score in mine if score.score >= 0]
        if not judged:
            raise UserError(f"{path}: no judgement of {quoted(model)} has a score")
        turns, kinds = sorted({score.turn for score in judged}), sorted({score.category for score in judged} - {""})
        found.append(
            Judgements(
                model,
                _judged(judged),
                {turn: _judged([score for score in judged if score.turn == turn]) for turn in turns},
                {kind: _judged([score for score in judged if score.category == kind]) for kind in kinds},
                len(mine) - len(judged),
            )
        )
    if not found:
        raise UserError(f"{path}: holds no judgement")
    return found


def _judged(scores: Sequence[_Score]) -> Judged:
    interval = share_interval([score.score / MOST_SCORE for score in scores], [str(score.question) for score in scores])
    mean = math.fsum(score.score for score in scores) / len(scores)
    questions = len({score.question for score in scores})
    return Judged(mean, MOST_SCORE * interval.low, MOST_SCORE * interval.high, len(scores), questions)


def _scores(path: Path, place: int, row: Mapping[str, Any], categories: Mapping[int | str, str]) -> Iterator[_Score]:
    """The scores in a line: one of FastChat's, or one for each turn of LogicKor's."""
    number = row.get("question_id", row.get("id"))
    if not isinstance(number, int | str) or isinstance(number, bool):
        raise UserError(f"{path}:{place}: no judgement: it has neither question_id nor id")
    category = str(row.get("category", categories.get(number, "")))
    if "query_single" in row or "query_multi" in row:
        model = str(row.get("model", row.get("model_id", path.stem)))
        for part, name in enumerate(("query_single", "query_multi"), start=1):
            if isinstance(row.get(name), Mapping):
                yield _Score(model, number, part, _number(row[name].get("judge_score"), path, place), category)
        return
    if "winner" in row or "g1_winner" in row:
        raise UserError(f"{path}:{place}: compares two answers; judgements of single answers are read (FastChat's mode single)")
    turn = row.get("turn")
    if not isinstance(turn, int) or turn < 1 or "score" not in row:
        raise UserError(f"{path}:{place}: no judgement: it has no turn or no score")
    yield _Score(str(row.get("model", "")), number, turn, _number(row["score"], path, place), category)


def _number(value: Any, path: Path, place: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > MOST_SCORE:
        raise UserError(f"{path}:{place}: score {quoted(value)}; use a number from 0 to {MOST_SCORE:g}, or -1 where there is none")
    return float(value)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with the numbers of the lines."""
    for place, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except Malformed as error:
            raise UserError(f"{path}:{place}: not valid JSON ({error})") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}:{place}: not a JSON object")
        yield place, value
