"""Sets of AIHub, as they come out of its archives: one JSON object per file, several records in each.

`TALKS` is the table of dialogue families: where the utterances are, who speaks, and who of them is the assistant. Rankings
(71748) and the reliability benchmark (71760) are functions. The set is known by the keys of its rows, not by a folder's number; a
row of another family is refused with the adapter that reads it. Only the labelled part is read (the raw part has the same talk
again), and training and validation are kept apart by option `part`.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from keural.data.adapters import preferences
from keural.data.adapters.base import (
    ASSISTANT_FIRST,
    Adapter,
    BadRow,
    Reads,
    Undeclared,
    WrongSchema,
    conversation,
    described,
    guarded,
    lookup,
    merged,
    missing,
    normalized,
    preference_pair,
    scalar,
    text_of,
    with_system,
)
from keural.data.adapters.judgements import POLICIES, UNRANKED, number_of, ranked_pairs
from keural.data.readers.options import NAME, SWITCH, TEXT, Option, OptionTable
from keural.data.records import Conversation, Drop, PreferencePair
from keural.recipe import SourceSpec
from keural.tokenizer.message import Message

LICENSE = "AIHub"
FORMATS = ("json", "jsonl", "zip")
PARTS = ("training", "validation", "all")
OTHER_PART = "other_part"
"""Reason of rows of another part of the same set, e.g. a corpus beside rankings; not a defect."""
ANSWERS = tuple(f"answer{number:02d}" for number in range(1, 6))
_RAW = re.compile(r"원천|^(?:T|V)S(?![a-z])")
_LABELLED = re.compile(r"라벨|^(?:T|V)L(?![a-z])")
_VALIDATION = re.compile(r"validation|^V[SL](?![a-z])", re.IGNORECASE)
_TRAINING = re.compile(r"training|^T[SL](?![a-z])", re.IGNORECASE)
_SPEAKER_PREFIX = re.compile(r"^\s*\d+\s*:\s*")


def selects(path: str, source: SourceSpec) -> bool:
    """Whether a file is of the labelled part, and of the wanted one of training and validation; a name that says nothing is."""
    parts = PurePosixPath(unicodedata.normalize("NFC", path)).parts
    is_raw, is_validation = _last(parts, _RAW, _LABELLED), _last(parts, _VALIDATION, _TRAINING)
    wanted = source.options.get("part", "training")
    return not is_raw and (wanted == "all" or is_validation is None or is_validation == (wanted == "validation"))


def _last(parts: Sequence[str], yes: re.Pattern[str], no: re.Pattern[str]) -> bool | None:
    """What the innermost name that says anything says."""
    for part in reversed(parts):
        if yes.search(part) or no.search(part):
            return bool(yes.search(part))
    return None


@dataclass(frozen=True)
class Talk:
    """One family of dialogues. Where several names are listed, a row has one of them."""

    lists: tuple[str, ...]
    """Where the list of utterances is in a record."""
    speakers: tuple[str, ...]
    texts: tuple[str, ...]
    """The first that holds text is taken."""
    roles: Mapping[str, str] | None = None
    """Role by the speaker's name; none: who speaks first is the user, the other the assistant."""
    records: str | None = None
    """Key of the list of records in a file's object."""
    merge: bool = True
    """Put runs of one speaker together; the chatbot families alternate, there a run is a defect."""
    people: bool = False
    """Both speakers are people, so the set must be asked for with `people: true`."""
    drops_opening: bool = False
    """Leave out what the assistant says before the user has spoken."""
    foreign: Mapping[str, str] = field(default_factory=dict)
    """Keys of other families' rows, and the adapter for them."""
    system: Callable[[Any, SourceSpec], str] | None = None
    extra: OptionTable = field(default_factory=dict)
    """Options that `system` and `heard` look at."""
    heard: Callable[[Any, SourceSpec], str] | None = None
    """What is added to an utterance."""


def _summary(session: Any, source: SourceSpec) -> str:
    """What earlier sessions said, as a system turn: option `memory`."""
    if not source.options.get("memory"):
        return ""
    found = session.get("prevAggregatedSummary", session.get("prevAggregatedpersonaSummary"))
    sides = found.values() if isinstance(found, dict) else []
    lines = [text for side in sides if isinstance(side, list) for item in side if (text := (scalar(item) or "").strip())]
    return "\n".join(["이전 대화 요약:", *lines]) if lines else ""


def _persona(row: Any, source: SourceSpec) -> str:
    """The second speaker's persona as a system turn: option `persona`."""
    if not source.options.get("persona"):
        return ""
    first = lookup(row, "utterances.0.persona_id")
    personas = lookup(row, "info.personas")
    for persona in personas if isinstance(personas, list) else []:
        if isinstance(persona, dict) and persona.get("persona_id") != first and isinstance(persona.get("persona"), list):
            return "\n".join(text for part in persona["persona"] if (text := (scalar(lookup(part, "profile")) or "").strip()))
    return ""


def _references(utterance: Any, source: SourceSpec) -> str:
    """The text an expert read, after what was asked or said: option `references`."""
    found = utterance.get("reference_text") if source.options.get("references") else None
    texts = [(scalar(lookup(item, "value")) or "").strip() for item in found] if isinstance(found, list) else []
    return "\n\n" + "\n".join(["참고:", *filter(None, texts)]) if any(texts) else ""


_SESSION_KEYS = {"sessionPersonaSummary": "aihub_141", "prevAggregatedpersonaSummary": "aihub_141"}
_MEMORY: OptionTable = {"memory": Option(SWITCH, "put what earlier sessions said into a system turn", False)}
_PART: OptionTable = {"part": Option(TEXT, "which part of the set is read", "training", PARTS)}
_READ_IF_ASKED = {
    "memory": ("prevAggregatedSummary", "prevAggregatedpersonaSummary"),
    "persona": ("info",),
    "references": ("reference_text",),
}
"""Fields that an option makes of use."""
_PEOPLE: OptionTable = {
    "people": Option(SWITCH, "train on talk of two people all the same; without it the source is refused", False)
}
_MULTISESSION = Talk(
    lists=("dialog",),
    speakers=("speaker",),
    texts=("utterance",),
    roles={"speaker1": "user", "speaker2": "assistant"},
    records="sessionInfo",
    merge=False,
    foreign=_SESSION_KEYS,
    system=_summary,
    extra=_MEMORY,
)
_UTTERANCES = ("utterances", "dialog", "dialogue", "conversation", "lines")
_ROLE_NAMES = ("role", "speaker", "speaker_role")
_KNOWLEDGE = Talk(
    lists=_UTTERANCES,
    speakers=_ROLE_NAMES,
    texts=("text", "utterance"),
    roles={"질문자": "user", "전문가": "assistant"},
    heard=_references,
    extra={"references": Option(SWITCH, "put the texts that an expert read after what was said", False)},
)
_LINES = ("annotations.lines",)
TALKS = {
    "aihub_multisession": _MULTISESSION,  # 009, 010, 011
    "aihub_141": Talk(
        lists=("dialog",),
        speakers=("speaker",),
        texts=("utterance",),
        roles={"speaker1": "user", "speaker2": "assistant"},
        records="sessionInfo",
        people=True,
        foreign={"prevAggregatedSummary": "aihub_multisession", "sessionSummary": "aihub_multisession"},
        system=_summary,
        extra=_MEMORY,
    ),
    "aihub_020": Talk(lists=_LINES, speakers=("speaker",), texts=("norm_text", "text"), records="info", people=True),
    "aihub_021": Talk(
        lists=_LINES,
        speakers=("speaker",),
        texts=("norm_text", "text"),
        roles={"B": "user", "A": "assistant"},
        records="info",
        drops_opening=True,
    ),
    "aihub_044": Talk(
        lists=("utterances",),
        speakers=("persona_id",),
        texts=("text",),
        system=_persona,
        extra={"persona": Option(SWITCH, "put the second speaker's persona into a system turn", False)},
    ),
    "aihub_045": _KNOWLEDGE,
    "aihub_expert_qa": _KNOWLEDGE,
    "aihub_046": Talk(
        lists=_UTTERANCES, speakers=_ROLE_NAMES, texts=("text", "utterance"), roles={"speaker": "user", "listener": "assistant"}
    ),
}


def _records(talk: Talk) -> Callable[[Any, SourceSpec], Iterator[Any]]:
    """The records of a file's object: the list under the family's key, a list of objects, or the object itself."""

    def split(value: Any, source: SourceSpec) -> Iterator[Any]:
        for item in value if isinstance(value, list) else [value]:
            found = lookup(item, talk.records) if talk.records else None
            if isinstance(found, list):
                yield from found
            elif isinstance(found, dict):
                yield found
            else:
                yield item

    return split


def _talk(talk: Talk) -> Callable[[Any, SourceSpec, str], Conversation | Drop]:
    """The adapter's function for one family."""

    def convert(value: Any, source: SourceSpec, where: str) -> Conversation | Drop:
        _check_family(value, talk, source)
        utterances = _found(value, talk.lists)
        if isinstance(utterances, dict):
            utterances = [utterances]
        if not isinstance(utterances, list):
            raise BadRow("malformed_row")
        turns = _turns(utterances, talk, source)
        if talk.drops_opening:
            turns = turns[next((place for place, turn in enumerate(turns) if turn.role == "user"), len(turns)) :]
        if talk.merge:
            turns = merged(turns)
        elif turns and turns[0].role != "user":
            raise BadRow(ASSISTANT_FIRST)
        system = talk.system(value, source) if talk.system else ""
        return conversation(with_system(system, turns), where, source.language)

    return guarded(convert)  # type: ignore[return-value]


def _check_family(value: Any, talk: Talk, source: SourceSpec) -> None:
    if not isinstance(value, dict):
        raise missing(value, *talk.lists)
    for key, adapter in talk.foreign.items():
        if key in value:
            raise WrongSchema(f"the row has the key {key!r} of another family; use adapter {adapter}")
    if talk.people and not source.options.get("people"):
        raise WrongSchema(
            "both speakers of this set are people, so it teaches small talk; options: {people: true} takes it all the same"
        )
    kind = scalar(lookup(value, "annotations.speaker_type"))
    if kind is not None and "다자간" in kind:
        raise BadRow("more_than_two_speakers")


def _found(value: Any, names: Sequence[str]) -> Any:
    """The first of some fields that a row has. Raises `WrongSchema` naming them all."""
    for name in names:
        if (found := lookup(value, name)) is not None:
            return found
    raise missing(value, *names)


def _turns(utterances: Iterable[Any], talk: Talk, source: SourceSpec) -> list[Message]:
    order: dict[str, str] = {}
    turns = []
    for utterance in utterances:
        if not isinstance(utterance, dict):
            raise BadRow("malformed_row")
        name = _speaker(utterance, talk)
        if talk.roles is None and name not in order:
            if len(order) == 2:
                raise BadRow("more_than_two_speakers")
            order[name] = ("user", "assistant")[len(order)]
        role = (order if talk.roles is None else talk.roles).get(name)
        if role is None:
            raise BadRow("unknown_role")
        text = _spoken(utterance, talk)
        turns.append(Message(role, text + talk.heard(utterance, source) if talk.heard and text.strip() else text))
    return turns


def _speaker(utterance: Any, talk: Talk) -> str:
    found = _found(utterance, talk.speakers)
    name = scalar(lookup(found, "id") if isinstance(found, dict) else found)
    if name is None or not name.strip():
        raise BadRow("missing_speaker")
    return name.strip()


def _spoken(utterance: Any, talk: Talk) -> str:
    """What was said; empty where the field is there and holds nothing."""
    for name in talk.texts:
        text = scalar(utterance.get(name))
        if text is not None and text.strip():
            return _SPEAKER_PREFIX.sub("", text) if len(talk.texts) > 1 and name == talk.texts[-1] == "text" else text
    if not any(name in utterance for name in talk.texts):
        raise missing(utterance, *talk.texts)
    return ""


def _rankings(value: Any, source: SourceSpec) -> Iterator[Any]:
    """71748: every pair of answers that the policy takes, as `{question, better, worse}`; other rows as they are."""
    for item in _items(value, "data_info"):
        if not isinstance(item, dict) or not any(name in item for name in ANSWERS):
            yield item
            continue
        try:
            yield from _ranked(item, source.options.get("pairs", POLICIES[0]))
        except BadRow as bad:
            yield bad


def _ranked(item: dict[str, Any], policy: str) -> Iterator[Any]:
    found = [(_rank(lookup(item[name], "ranking")), item[name]) for name in ANSWERS if name in item]
    ranks, answers = [rank for rank, _ in found if rank is not None], [answer for rank, answer in found if rank is not None]
    if len(ranks) < 2:
        raise BadRow("missing_ranking")
    left = any(rank is None and scalar(lookup(answer, "contents")) for rank, answer in found)
    pairs = ranked_pairs([-rank for rank in ranks], policy)
    untied = sum(ranks[better] != ranks[worse] for better, worse in pairs)
    for better, worse in pairs:
        yield item | {
            "better": answers[better],
            "worse": answers[worse],
            "tie": ranks[better] == ranks[worse],
            "weight": 1 / max(untied, 1),
            "left": left,
        }


def _items(value: Any, key: str) -> Iterator[Any]:
    for item in value if isinstance(value, list) else [value]:
        found = item.get(key) if isinstance(item, dict) else None
        yield from found if isinstance(found, list) else [item]


def _rank(value: Any) -> float | None:
    return number_of(value, "ranking", "ranks are numbers, 1 is the best; mend the rows")


def _ranking(value: Any, source: SourceSpec, where: str) -> PreferencePair | Drop:
    """71748: the better (lower ranking) of two answers to a question against the worse. Option `pairs`: best_vs_worst (one of each
    question), adjacent or all; the pairs of a question are weighted so that each question counts once.
    """
    if not isinstance(value, dict) or not {"question", "better"} & value.keys():
        if isinstance(value, dict) and ("contents" in value or "data_id" in value):
            raise BadRow(OTHER_PART)
        raise missing(value, "question", *ANSWERS)
    if "better" not in value:
        raise BadRow(OTHER_PART)  # the set's SFT and PPO parts: one answer, or none
    if value.get("tie"):
        raise BadRow("score_tie")
    question, better, worse = (
        text_of(value, "question"),
        *(text_of({name: lookup(value[name], "contents")}, name) for name in ("better", "worse")),
    )
    if normalized(question) in (normalized(better), normalized(worse)):
        raise BadRow("answer_equals_question")
    pair = preference_pair([Message("user", question)], better, worse, where, source.language)
    notes = (UNRANKED,) if value.get("left") else ()
    return pair if isinstance(pair, Drop) else replace(pair, weight=value.get("weight", 1.0), notes=notes)


def _reliability(value: Any, source: SourceSpec, where: str) -> PreferencePair | Drop:
    """71760: `{prompt, chosen, rejected}`, or `{Prompt, Candidate_answer: {key: text}}` with option `label`: the field that says
    which key is best (a key, a list from best to worst, or a rank of each key). The set's description does not name that field.
    """
    if isinstance(value, dict) and "chosen" in value and "rejected" in value:
        pair = preferences.ADAPTERS["preference"](value, source.model_copy(update={"options": {}}), where)
        assert isinstance(pair, PreferencePair | Drop)
        return pair
    candidates = _found(value, ("Candidate_answer", "candidate_answer", "chosen"))
    if "label" not in source.options:
        raise missing(value, "chosen", hint="; option label must name the field that says which of Candidate_answer is best")
    if not isinstance(candidates, dict):
        raise BadRow("malformed_row")
    name = source.options["label"]
    label = lookup(value, name)
    if label is None:
        raise missing(value, str(name))
    best, worst = _best_and_worst(label, list(candidates), name)
    prompt = scalar(_found(value, ("Prompt", "prompt")))
    answers = [scalar(candidates[key]) for key in (best, worst)]
    if prompt is None or None in answers:
        raise BadRow("malformed_row")
    chosen, rejected = (str(answer) for answer in answers)
    pair = preference_pair([Message("user", prompt)], chosen, rejected, where, source.language)
    alone = len(candidates) > 2 and not isinstance(label, list | dict)  # the best is known, the worst is any other
    return replace(pair, notes=(UNRANKED,)) if alone and isinstance(pair, PreferencePair) else pair


def _best_and_worst(label: Any, keys: list[str], name: str | int) -> tuple[str, str]:
    if isinstance(label, dict):
        ranks = {key: rank for key in keys if (rank := _rank(label.get(key))) is not None}
        order = sorted(ranks, key=lambda key: ranks[key])
        if len(order) > 1 and ranks[order[0]] == ranks[order[-1]]:
            raise BadRow("score_tie")
    else:
        order = [scalar(item) or "" for item in (label if isinstance(label, list) else [label])]
        if unknown := [item for item in order if item not in keys]:
            raise Undeclared(name, unknown[0], "it is one of the keys of Candidate_answer; name another field in the option label")
        if not isinstance(label, list):
            order += [key for key in keys if key != order[0]]
    if len(order) < 2 or order[0] == order[-1]:
        raise BadRow("missing_ranking")
    return order[0], order[-1]


def _first_parts(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.split(".")[0] for name in names)


def _talk_reads(talk: Talk) -> Callable[[SourceSpec], Reads]:
    """Which fields of the rows of a family are read."""

    def of(source: SourceSpec) -> Reads:
        asked = [name for option, names in _READ_IF_ASKED.items() if source.options.get(option) for name in names]
        return Reads(_first_parts([*talk.lists, *asked]), talk.lists, _first_parts([*talk.speakers, *talk.texts, *asked]))

    return of


def _ranking_reads(source: SourceSpec) -> Reads:
    return Reads(frozenset(("question", *ANSWERS, "better", "worse", "tie", "weight", "left")))


def _reliability_reads(source: SourceSpec) -> Reads:
    if "label" in source.options:
        candidates = ("Candidate_answer", "candidate_answer", "Prompt", "prompt", "chosen", "rejected")
        return Reads(_first_parts([*candidates, str(source.options["label"])]), optional=("label",))
    pair = preferences.ADAPTERS["preference"].reads
    assert pair is not None
    return pair(source)


def _talk_adapter(talk: Talk) -> Adapter:
    options = {**_PART, **talk.extra, **(_PEOPLE if talk.people else {})}
    speakers = "two people" if talk.people else "a person and an assistant"
    lists, who, what = (" or ".join(f"`{name}`" for name in names) for names in (talk.lists, talk.speakers, talk.texts))
    return Adapter(
        "conversations",
        _talk(talk),
        FORMATS,
        options,
        f"Dialogues of {speakers}, as the archives of the set hold them: utterances in {lists}, the speaker of each in {who}, "
        f"its text in {what}.",
        split=_records(talk),
        selects=selects,
        license=LICENSE,
        reads=_talk_reads(talk),
    )


ADAPTERS = {
    **{name: _talk_adapter(talk) for name, talk in TALKS.items()},
    "aihub_71748": Adapter(
        "pairs",
        guarded(_ranking),
        FORMATS,
        {**_PART, "pairs": Option(TEXT, "which pairs are made of the answers to a question", "best_vs_worst", POLICIES)},
        described(_ranking),
        split=_rankings,
        selects=selects,
        license=LICENSE,
        reads=_ranking_reads,
    ),
    "aihub_71760": Adapter(
        "pairs",
        guarded(_reliability),
        FORMATS,
        {**_PART, "label": Option(NAME, "field that says which of the candidate answers is best")},
        described(_reliability),
        split=lambda value, source: value if isinstance(value, list) else [value],
        selects=selects,
        license=LICENSE,
        benchmark=True,
        reads=_reliability_reads,
    ),
}
