"""Gates: what is wrong with a conversation or pair that is well formed but should not be learned from.

In: a record. Out: the reason to drop it and what was found, or None. `GATES` is the table; for every gate a recipe says `drop`,
`count` (keep it, but show the number) or `skip`, source by source. What no record can be without (turns with text that alternate,
an answer at the end, two different answers to one history) is not a gate: `keural.data.adapters.base` lets nothing else through.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from keural.data.filtering import gaps
from keural.data.filtering.gaps import Chat, learned, turns_of
from keural.data.filtering.languages import disguised_word, foreign_side
from keural.data.filtering.personal import kinds_in
from keural.data.records import Document, Drop, Kind, PreferencePair, Record
from keural.data.sources import Source
from keural.errors import UserError, nearest
from keural.recipe import GateAction, SourceSpec

_MODELS = r"(?:ChatGPT|GPT-?[34]|(?:Claude|Bard|Gemini)(?!(?-i:,? [A-Z]))|LLaMA|Alpaca|Vicuna|Open ?Assistant)"
"""Claude Monet is no model."""
_MAKERS = r"(?:OpenAI|Anthropic|Google|Meta|Microsoft|LMSYS)"
_MODELS_KO = r"(?:챗 ?GPT|챗지피티|ChatGPT|GPT(?:-?[34](?:\.5)?)?|클로드|바드|제미나이)"
_MAKERS_KO = r"(?:OpenAI|오픈 ?AI|오픈에이아이|앤트로픽|앤스로픽|Anthropic|구글|Google|마이크로소프트|메타)"
_SELF = re.compile(
    rf"\b(?:I am|I['’]m|my name is) {_MODELS}\b|\bas {_MODELS}, I\b"
    rf"|\bI(?: am|['’]m| was)\b[^.!?\n]{{0,60}}\b(?:developed|created|trained|made|built) by {_MAKERS}\b"
    rf"|(?:저는|나는|제 이름은|내 이름은)[^.!?\n]{{0,20}}"
    rf"(?:{_MODELS_KO}(?:입니다|이에요|예요|에요|이다|이야|야|라고|이라고|라는|이라는|로서)"
    rf"|{_MAKERS_KO}\s?(?:가|이|에서|에 의해|의|사가)\s?[^.!?\n]{{0,20}}"
    r"(?:만든|만들|개발|훈련|학습|제작|언어 ?모델|인공지능|AI|챗봇))",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\bas an? (?:AI|artificial intelligence)(?: language)?(?: model| assistant)?,? I "
    r"(?:do not|don['’]t|cannot|can['’]t|am not|am unable|have no|lack)\b"
    r"|\bI(?: am|['’]m) (?:just |only )?an AI(?: language model| assistant)?(?: and|,) I (?:do not|don['’]t|cannot|can['’]t)\b"
    r"|\A\W*(?:I(?: am|['’]m) (?:very )?sorry,? (?:but )?I|I apologi[sz]e,? but I|I) "
    r"(?:cannot|can['’]t|am unable to|am not able to)\b[^.!?\n]{0,20}\b(?:fulfill|comply|assist|provide|help|answer|do that)"
    r"|(?:AI|인공지능)\s*(?:언어\s*)?(?:모델|어시스턴트|챗봇)(?:로서|이므로|이기 때문에|이라서|이라)"
    r"[^.!?\n]{0,60}(?:없|못|않|아니|불가|어렵)"
    r"|\A\W*(?:죄송합니다|죄송하지만|미안하지만)[^!?\n]{0,20}(?:요청|질문)[^.!?\n]{0,20}수\s*없",
    re.I,
)
_CONTROL = re.compile(
    r"<\|(?:im_start|im_end|endoftext|system|user|assistant|eot_id|begin_of_text|start_header_id|end_header_id|pad)\|>"
    r"|</?s>|<(?:bos|eos|pad|unk)>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|^#{2,3} (?:Human|Assistant|Instruction|Response):",
    re.M,
)


class Finding(NamedTuple):
    """What a gate found in a record."""

    reason: str
    detail: str = ""
    """The words that were found, in quotes, or where; never a person's data."""


@dataclass(frozen=True)
class Gate:
    """One gate: `check` says what it finds in a record, `action` what is done where neither recipe nor adapter say.

    Without `check` it is carried out elsewhere, by what has seen more than the record.
    """

    reasons: tuple[str, ...]
    """Those under which it counts."""
    check: Callable[[Chat], Finding | None] | None
    action: GateAction
    takes: str
    """What it finds, in plain words."""
    leaves: str = ""
    """What looks like it and is not found."""


def _self_identification(record: Chat) -> Finding | None:
    return _quoted("self_identification", _found(_SELF, learned(record)))


def _refusals(record: Chat) -> Finding | None:
    return _quoted("refusal", _found(_REFUSAL, [record.chosen])) if isinstance(record, PreferencePair) else None


def _control_strings(record: Chat) -> Finding | None:
    return _quoted("control_string", _found(_CONTROL, [turn.text for turn in turns_of(record)]))


def _personal_data(record: Chat) -> Finding | None:
    kind = next((kind for turn in turns_of(record) for kind in kinds_in(turn.text)), None)
    return Finding("personal_data", kind) if kind else None


def _language(record: Chat) -> Finding | None:
    if side := foreign_side(record):
        return Finding("not_korean" if record.language == "ko" else "not_english", side)
    return _quoted("disguised_letters", disguised_word(record))


def _found(pattern: re.Pattern[str], texts: list[str]) -> str | None:
    return next((found[0] for text in texts if (found := pattern.search(text))), None)


def _quoted(reason: str, found: str | None) -> Finding | None:
    return None if found is None else Finding(reason, f"{' '.join(found.split())!r:.42}")


GATES: dict[str, Gate] = {
    "placeholders": Gate(
        ("placeholder",),
        lambda record: _quoted("placeholder", gaps.placeholder(record)),
        "drop",
        "a turn from which something was taken out, or in which something was never filled in: `<image>`, `<audio>`, `[사진]`; "
        "`<NAME>`, `[PERSON_1]`, `NAME_1`, `#@이름#`; `{{name}}`, `{topic}`, `{이름}`; `<noinput>`, `<nooutput>`; a first question "
        "that is only `N/A`, `none` or 없음",
        "code, formulas and JSON; small tags (`<name>`), pairs of tags, links (`[link](..)`) and words in brackets; braces around "
        "other words; what a conversation about tags, variables, templates or Markdown says of them; `____`, as questions have it",
    ),
    "empty_answers": Gate(
        ("empty_answer",),
        lambda record: _quoted("empty_answer", gaps.empty_answer(record)),
        "count",
        "an answer that is only `none`, `N/A`, `null`, `nan`, `TBD`, 없음 or 해당 없음: a label of a classification, or the lack "
        "of an answer",
        "where a question or a system turn names that word among the answers to choose from; answers that go on",
    ),
    "blanks": Gate(
        ("blank",),
        lambda record: _quoted("blank", gaps.blank(record)),
        "count",
        "what a reader is to fill in: `[Your Name]`, `[INSERT DATE]`, `[Company Name]`, `[이름]`, `[회사명]`, as letters and forms "
        "have it",
        "code, links, other words in brackets (`[출처]`, `[laughs]`)",
    ),
    "masked_names": Gate(
        ("masked_name",),
        lambda record: _quoted("masked_name", gaps.mask(record)),
        "count",
        "signs in place of a name or number: 김○○, OO시, XX 아파트, `010-XXXX-XXXX`",
        "single signs, `____`, `****` (dividers, bold type, oaths), ㅇㅇ",
    ),
    "self_identification": Gate(
        ("self_identification",),
        _self_identification,
        "drop",
        "an answer that is trained says that it is another model or of another maker: I am ChatGPT, 저는 OpenAI가 만든 모델입니다",
        "what an answer says of such models: 저는 GPT를 씁니다, I am Claude Monet",
    ),
    "refusals": Gate(
        ("refusal",),
        _refusals,
        "drop",
        "the better answer of a pair is a stock refusal: As an AI, I cannot; 요청은 도와드릴 수 없습니다",
        "refusals in conversations and as the worse answer; an AI that goes on to answer",
    ),
    "control_strings": Gate(
        ("control_string",),
        _control_strings,
        "count",
        "a turn spells a marker of some chat format: `<|im_end|>`, `[INST]`; it is encoded as text and never read as a marker",
    ),
    "personal_data": Gate(
        ("personal_data",),
        _personal_data,
        "count",
        "a turn holds an e-mail address, a Korean telephone number, or a resident registration number with its hyphen",
        "thirteen digits without a hyphen (sums), account numbers, addresses of computers: only cleaning masks these, in documents",
    ),
    "language": Gate(
        ("not_korean", "not_english", "disguised_letters"),
        _language,
        "drop",
        "a side is not in its source's `language`: the prose of `ko` has under 30% Hangul, that of `en` under 50% Latin letters; "
        "of `en` also words with letters that only look like Latin ones (Cyrillic, full-width), over 1% and at least two",
        "code, JSON, markup, formulas, addresses, numbers, for `ko` names and abbreviations in Latin letters; a question with a "
        "line in the language, whatever it quotes; answers to a question for a translation or another language; under 20 letters; "
        "other languages",
    ),
    "duplicate_prompts": Gate(  # keural.data.filtering.holdout
        ("duplicate_prompt",), None, "skip", "a prompt, system turn included, that another record has", "the first record of it"
    ),
    "contaminated": Gate(  # keural.data.filtering.decontamination
        ("contaminated",),
        None,
        "drop",
        "the record holds an item of an evaluation set of `data.decontaminate`; documents, too",
        "items that are too short to be known again",
    ),
}
EAGER_SHARE = 0.05
"""A gate that drops more of a source is likely to judge what the source is made of, and is warned about."""
_GATE_OF = {reason: name for name, gate in GATES.items() for reason in gate.reasons}


def gate_of(reason: str) -> str | None:
    """The gate that counts under a reason; None for other reasons."""
    return _GATE_OF.get(reason)


def check_gates(source: Source) -> None:
    """Refuse gates that are not known, and settings that have no effect on records of the source's kind. Raises `UserError`."""
    if problem := _wrong_gates(source.spec, source.kind):
        raise UserError(f"source {source.name!r}: {problem}")


def _wrong_gates(spec: SourceSpec, kind: Kind) -> str | None:
    if unknown := next((name for name in spec.gates if name not in GATES), None):
        return f"unknown gate {unknown!r}{nearest(unknown, GATES)}; there are {', '.join(sorted(GATES))}"
    if spec.gates.get("duplicate_prompts") == "count":
        return "gate duplicate_prompts can drop or skip, but not count"
    if spec.id_space is not None and spec.id_field is None:
        return "id_space needs id_field, the field that holds the id"
    settings = {
        "gates": spec.gates.keys() - {"contaminated"},
        "min_characters": spec.min_characters,
        "max_characters": spec.max_characters,
        "max_length_ratio": spec.max_length_ratio,
        "id_field": spec.id_field,
    }
    if kind == "documents" and (given := [name for name, value in settings.items() if value]):
        return f"{given[0]} is for conversations and pairs; adapter {spec.adapter} gives documents"
    if kind != "pairs" and spec.max_length_ratio is not None:
        taken = "is taken as single answers" if kind == "answers" else f"adapter {spec.adapter} gives {kind}"
        return f"max_length_ratio is for pairs; {'the source ' if kind == 'answers' else ''}{taken}"
    return None


class Gatekeeper:
    """The gates of one source: recipe before adapter before the gates' own default."""

    def __init__(self, source: SourceSpec, defaults: dict[str, GateAction]) -> None:
        self.actions = {name: source.gates.get(name, defaults.get(name, gate.action)) for name, gate in GATES.items()}
        self._source, self.source = source, source.name
        self._checks: dict[GateAction, list[Callable[[Chat], Finding | None]]] = defaultdict(list)
        for name, gate in GATES.items():
            if gate.check:
                self._checks[self.actions[name]].append(gate.check)

    def reasons(self, record: Record, action: GateAction) -> Iterator[str]:
        """The reasons of `findings`."""
        return (finding.reason for finding in self.findings(record, action))

    def drop_of(self, record: Record) -> Drop | None:
        """The first of what the gates drop the record for, as a drop; None where they let it through."""
        found = next(self.findings(record, "drop"), None)
        return Drop(found.reason, record.where, found.detail) if found else None

    def findings(self, record: Record, action: GateAction) -> Iterator[Finding]:
        """What the gates find that have this action (the limits of length drop); nothing for documents."""
        if isinstance(record, Document):
            return
        if action == "drop" and (reason := self._length(record)):
            yield Finding(reason)
        for check in self._checks[action]:
            if finding := check(record):
                yield finding

    def _length(self, record: Chat) -> str | None:
        source, answers = self._source, _answers(record)
        if source.min_characters and min(map(len, answers)) < source.min_characters:
            return "answer_too_short"
        if source.max_characters is not None and max(len(turn.text) for turn in turns_of(record)) > source.max_characters:
            return "turn_too_long"
        if source.max_length_ratio is not None and max(map(len, answers)) > source.max_length_ratio * min(map(len, answers)):
            return "length_ratio"
        return None


def _answers(record: Chat) -> list[str]:
    if isinstance(record, PreferencePair):
        return [record.chosen, record.rejected]
    return learned(record) if record.good is None else [record.messages[-1].content]
