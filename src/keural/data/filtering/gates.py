"""Gates: what is wrong with a conversation or pair that is well formed but should not be learned from.

In: a record. Out: the reason to drop it, or None. `GATES` is the table; for every gate a recipe says `drop`, `count` (keep it, but
show the number) or `skip`, source by source. What no record can be without (turns with text that alternate, an answer at the end,
two different answers to one history) is not a gate: `keural.data.adapters.base` lets nothing else through.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from keural.data.records import Conversation, Document, Kind, PreferencePair, Record
from keural.data.sources import Source
from keural.errors import UserError, nearest
from keural.recipe import GateAction, SourceSpec

Chat = Conversation | PreferencePair
MIN_LETTERS = 20
"""Fewer letters say nothing about a language."""
MIN_SHARE = 0.3
"""A Korean side must have this share of Hangul among its letters; names, terms and quotations in English leave more."""
MAX_SHARE = 0.5
"""An English side must not have more than this share of Hangul."""
_PLACEHOLDER = re.compile(
    r"<(?:NAME|PERSON|LOCATION|ORGANIZATION|PHONE|ADDRESS|NUMBER|no ?input|image|link|url)>|\[(?:image|link|이름)\]", re.I
)
_NOTHING = re.compile(r"\s*(?:<?no ?input>?|n/?a|none|null|nan|tbd|todo|없음|해당 ?없음)\.?\s*", re.I)
_MODELS = r"(?:ChatGPT|GPT-?[34]|Claude|Bard|Gemini|LLaMA|Alpaca|Vicuna|Open ?Assistant)"
_MAKERS = r"(?:OpenAI|Anthropic|Google|Meta|Microsoft|LMSYS)"
_KOREAN_NAMES = r"(?:OpenAI|오픈\s?AI|오픈에이아이|앤트로픽|Anthropic|챗\s?GPT|챗지피티|ChatGPT|GPT|클로드|바드)"
_SELF = re.compile(
    rf"\b(?:I am|I['’]m|my name is) {_MODELS}\b|\bas {_MODELS}, I\b"
    rf"|\bI(?: am|['’]m| was)\b[^.!?\n]{{0,60}}\b(?:developed|created|trained|made|built) by {_MAKERS}\b"
    rf"|(?:저는|나는|제 이름은)[^.!?\n]{{0,20}}{_KOREAN_NAMES}",
    re.I,
)
_REFUSAL = re.compile(
    r"\bas an? (?:AI|artificial intelligence)(?: language)?(?: model| assistant)?,? I "
    r"(?:do not|don['’]t|cannot|can['’]t|am not|am unable|have no|lack)\b"
    r"|\bI(?: am|['’]m) (?:just |only )?an AI(?: language model| assistant)?(?: and|,) I (?:do not|don['’]t|cannot|can['’]t)\b"
    r"|\A\W*(?:I(?: am|['’]m) (?:very )?sorry,? (?:but )?I|I apologi[sz]e,? but I|I) "
    r"(?:cannot|can['’]t|am unable to|am not able to)\b[^.!?\n]{0,20}\b(?:fulfill|comply|assist|provide|help|answer|do that)"
    r"|(?:AI|인공지능)\s*(?:언어\s*)?(?:모델|어시스턴트|챗봇)(?:로서|이므로|이기 때문에|이라서|이라)"
    r"|\A\W*(?:죄송합니다|죄송하지만|미안하지만)[^!?\n]{0,20}(?:요청|질문)[^.!?\n]{0,20}수\s*없",
    re.I,
)
_CONTROL = re.compile(
    r"<\|(?:im_start|im_end|endoftext|system|user|assistant|eot_id|begin_of_text|start_header_id|end_header_id|pad)\|>"
    r"|</?s>|<(?:bos|eos|pad|unk)>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|^#{2,3} (?:Human|Assistant|Instruction|Response):",
    re.M,
)
_NUMBERS = re.compile(
    r"(?<!\d)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])-[1-4]\d{6}(?!\d)"  # resident registration number
    r"|(?<!\d)01[016789][-. ]?\d{3,4}[-. ]?\d{4}(?!\d)"
    r"|(?<!\d)0(?:2|[3-6]\d)-\d{3,4}-\d{4}(?!\d)"
)
_ADDRESS = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}\.[A-Za-z]")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`|https?://\S+", re.S)
_HANGUL = re.compile("[가-힣ㄱ-ㅎㅏ-ㅣ\u1100-\u11ff]")
_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class Gate:
    """One gate: `check` says why a record should be dropped, `action` what is done where neither recipe nor adapter say.

    Without `check` it is carried out elsewhere, by what has seen more than the record.
    """

    check: Callable[[Chat], str | None] | None
    action: GateAction = "drop"


def _placeholders(record: Chat) -> str | None:
    """A turn that is a placeholder, or an answer or question that holds one where a name should be."""
    return "placeholder" if any(_PLACEHOLDER.search(text) or _NOTHING.fullmatch(text) for _, text in _turns(record)) else None


def _self_identification(record: Chat) -> str | None:
    """An answer that the model should give says that it is another model."""
    return "self_identification" if any(_SELF.search(text) for text in _learned(record)) else None


def _refusals(record: Chat) -> str | None:
    """The better answer of a pair is a stock refusal."""
    return "refusal" if isinstance(record, PreferencePair) and _REFUSAL.search(record.chosen) else None


def _control_strings(record: Chat) -> str | None:
    """A turn spells a marker of some chat format. It is encoded as text and can do no harm, but was not meant to be text."""
    return "control_string" if any(_CONTROL.search(text) for _, text in _turns(record)) else None


def _personal_data(record: Chat) -> str | None:
    """A turn holds a resident number, a telephone number or an e-mail address."""
    found = any(_NUMBERS.search(text) or ("@" in text and _ADDRESS.search(text)) for _, text in _turns(record))
    return "personal_data" if found else None


def _language(record: Chat) -> str | None:
    """A side of a record is not in its source's language: the questions, the answers, chosen or rejected."""
    if record.language not in ("ko", "en"):
        return None
    shares = [share for text in _sides(record) if (share := hangul_share(text)) is not None]
    if record.language == "ko":
        return "not_korean" if any(share < MIN_SHARE for share in shares) else None
    return "not_english" if any(share > MAX_SHARE for share in shares) else None


def hangul_share(text: str) -> float | None:
    """Hangul among the letters of a text without code and addresses; None where there are too few letters to tell."""
    prose = _CODE.sub(" ", text)
    letters = len(_LETTER.findall(prose))
    return len(_HANGUL.findall(prose)) / letters if letters >= MIN_LETTERS else None


GATES: dict[str, Gate] = {
    "placeholders": Gate(_placeholders),
    "self_identification": Gate(_self_identification),
    "refusals": Gate(_refusals),
    "control_strings": Gate(_control_strings, "count"),
    "personal_data": Gate(_personal_data, "count"),
    "language": Gate(_language),
    "duplicate_prompts": Gate(None, "skip"),  # keural.data.filtering.holdout
    "contaminated": Gate(None),  # keural.data.filtering.decontamination; documents, too
}


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
    if kind == "conversations" and spec.max_length_ratio is not None:
        return f"max_length_ratio is for pairs; adapter {spec.adapter} gives conversations"
    return None


class Gatekeeper:
    """The gates of one source: recipe before adapter before the gates' own default."""

    def __init__(self, source: SourceSpec, defaults: dict[str, GateAction]) -> None:
        self.actions = {name: source.gates.get(name, defaults.get(name, gate.action)) for name, gate in GATES.items()}
        self._source, self.source = source, source.name

    def reasons(self, record: Record, action: GateAction) -> Iterator[str]:
        """What the gates find that have this action (the limits of length drop); nothing for documents."""
        if isinstance(record, Document):
            return
        if action == "drop" and (reason := self._length(record)):
            yield reason
        for name, gate in GATES.items():
            if gate.check and self.actions[name] == action and (reason := gate.check(record)):
                yield reason

    def _length(self, record: Chat) -> str | None:
        source, answers = self._source, _answers(record)
        if source.min_characters and min(map(len, answers)) < source.min_characters:
            return "answer_too_short"
        if source.max_characters is not None and max(len(text) for _, text in _turns(record)) > source.max_characters:
            return "turn_too_long"
        if source.max_length_ratio is not None and max(map(len, answers)) > source.max_length_ratio * min(map(len, answers)):
            return "length_ratio"
        return None


def _turns(record: Chat) -> list[tuple[str, str]]:
    """Role and text of everything that a record holds."""
    if isinstance(record, Conversation):
        return [(turn.role, turn.text) for turn in record.messages]
    return [
        *((turn.role, turn.text) for turn in record.prompt),
        *(("assistant", text) for text in (record.chosen, record.rejected)),
    ]


def _learned(record: Chat) -> list[str]:
    """Answers that a model is made to give."""
    return [record.chosen] if isinstance(record, PreferencePair) else _answers(record)


def _answers(record: Chat) -> list[str]:
    if isinstance(record, PreferencePair):
        return [record.chosen, record.rejected]
    return [turn.content for turn in record.messages if turn.role == "assistant" and turn.is_trained]


def _sides(record: Chat) -> list[str]:
    """The questions together, and each answer of a pair, or the answers of a conversation together."""
    turns = record.messages if isinstance(record, Conversation) else record.prompt
    asked = "\n".join(turn.content for turn in turns if turn.role == "user")
    return [asked, *_answers(record)] if isinstance(record, PreferencePair) else [asked, "\n".join(_answers(record))]
