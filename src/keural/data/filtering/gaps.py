"""Gaps: what stands in a turn where something was cut out, never filled in, or never there.

In: a record. Out: the first gap of a kind, as it is written, or None. Four kinds, one gate each:

- a placeholder: a picture, a sound, a name that was taken out, a variable of a template, the word of an export for an empty cell;
- an empty answer: `none`, `N/A`, 없음, which may be a label of a classification and may be the lack of one;
- a blank: `[Your Name]`, `[회사명]`, which a letter has for its reader to fill in, and an unfinished answer for nobody;
- a mask: 김○○, XX시, which writers put for a name that they do not give.

Nothing is a gap in code, formulas or JSON; no tag, link or variable is one where a conversation speaks of tags, links or variables.
"""

import re
from collections.abc import Sequence

from keural.data.filtering.prose import without_code
from keural.data.records import Conversation, PreferencePair
from keural.tokenizer.message import Message

Chat = Conversation | PreferencePair

_ENTITY = (
    r"(?:NAME|PERSON|LOCATION|LOC|ORGANI[SZ]ATION|ORG|PHONE|EMAIL|ADDRESS|NUMBER|NUM|DATE|TIME|URL|LINK|USER|USERNAME|COMPANY|CITY"
    r"|COUNTRY|ID)(?:[_ -]?\d{1,3})?"
)
_MEDIUM = (
    r"(?:image|img|audio|video|speech|picture|photo|IMAGE|IMG|AUDIO|VIDEO|SPEECH|PICTURE|PHOTO|Image|Audio|Video|Picture|Photo)"
    r"(?:[_ -]?(?:\d{1,3}|placeholder|pad))?"
)
_MEDIUM_KO = r"(?:이미지|사진|그림|동영상|영상|음성|오디오|첨부 ?파일)"
_VARIABLE = (
    r"(?:(?:first|last|full|user|customer|client|company|product|brand|city|country|bot|model|assistant|recipient|sender|your)"
    r"[_ ])?(?:name|author|user|username|company|topic|subject|product|city|country|location|language|date|title|persona|character"
    r"|char|bot|input|output|context|question|answer|query|prompt|instruction|passage|document|article|text|sentence|email|phone"
    r"|url|link)"
    r"|(?:이름|성명|사용자|고객|회사|상품|제품|도시|지역|나라|국가|언어|날짜|제목|주제|질문|답변|대답|문장|본문|내용|문서|입력"
    r"|출력|지시|맥락)(?:명| ?이름)?"
)
"""Names that prompts have for what is filled in; single braces hold anything else, too: sets, formulas, quotations."""
_NO_LINK = r"(?![(\[:])"
_NO_CELL_INSIDE = re.compile(r"<[Nn][Oo][ _-]?(?:[Ii]nput|[Oo]utput|INPUT|OUTPUT)>")
_CUT_MEDIUM = re.compile(rf"<{_MEDIUM}>|<\|{_MEDIUM}\|>|\[(?:{_MEDIUM}|{_MEDIUM_KO})\]{_NO_LINK}")
_CUT_ENTITY = re.compile(
    rf"<{_ENTITY}>|\[{_ENTITY}\]{_NO_LINK}|\bNAME_\d{{1,3}}\b|#@(?:[가-힣]|[A-Z]){{2,12}}#"
    r"|&(?:name|company-?name|address|tel-num|affiliation|others|account|online-account)\d{0,3}&"
)
_UNFILLED = re.compile(
    r"(?<![\w\\^}{$%#])\{\{ ?[A-Za-z가-힣_][\w가-힣.-]{0,30}(?: [\w가-힣.-]{1,20}){0,3} ?\}\}(?!\})"
    rf"|(?<![\w\\^}}{{%#])\{{(?i:{_VARIABLE})\}}(?![}}{{(]|[^\W가-힣])"
)
_BLANK_KO = r"(?:이름|성명|성함|날짜|주소|회사명?|학교명?|기관명|전화번호|연락처|이메일|직함|직책|부서명?|금액|고용주)"
_BLANK = re.compile(
    r"(?<![\w\])}])(?:<(?:your|insert|enter) [^\]\[<>\n]{1,50}>"
    rf"|<(?:[가-힣]{{1,8}} ){{0,3}}{_BLANK_KO}>"
    r"|\[(?:(?:please )?(?:your|insert|enter|add|put|fill in|write|provide|specify|recipient|sender|hiring manager|employer"
    r"|candidate|customer|client)(?:['’]s)?(?: [\w'’/,&-]{1,24}){0,6}"
    r"|(?:[\w'’/]{1,20} ){0,3}(?:name|names|date|address|e-?mail|phone number|number|job title|company|position|degree|salary"
    r"|amount)"
    rf"|(?:[가-힣]{{1,8}} ){{0,3}}{_BLANK_KO})"
    rf"\]{_NO_LINK})",
    re.IGNORECASE,
)
_MASK = re.compile(
    r"[○◯〇△◇□]{2,}|(?<![가-힣])[가-힣] ?[○◯〇](?= ?(?:씨|님|양|군))|(?<=[가-힣])([OＯXＸ×])\1{1,5}(?![A-Za-z])"
    r"|(?<![A-Za-z\d])([OＯXＸ×])\2{1,5}(?= ?[가-힣])(?! ?염색체)|(?<!\w)[Xx]{3,4}(?:[-. ][Xx]{3,4})+|\d[-. ][Xx*]{3,4}[-. ]"
)
_NO_CELL = re.compile(
    r"\W{0,3}[<\[(]\s*(?:no[ _-]?(?:input|output|answer|response)|입력 ?없음|출력 ?없음)\s*[>\])]\W{0,3}", re.IGNORECASE
)
_NOTHING = re.compile(r"\W{0,2}(n/?a|none|null|nan|nil|tbd|to ?do|not applicable|없음|해당 ?(?:사항 ?)?없음)\W{0,2}", re.IGNORECASE)
_LONGEST_NOTHING = 24
_OF_MARKUP = re.compile(
    r"</(?!(?:tools|tool_call|think)>)[A-Za-z]|<[A-Za-z][^<>\n]{0,200}/>|<[A-Za-z]{1,20} [a-z-]{1,20}="
    r"|(?<![a-z])(?:x?html5?|xml|xslt|svg|rss|jsx|tsx|markdown|markup|dom|tags?|placeholders?|angular|vue|react|syntax)(?![a-z])"
    r"|[>\]}][\"'`”’]? (?:element|attribute|component|token|character|symbol)"
    r"|태그|마크업|마크다운|엘리먼트|자리 ?표시자|플레이스홀더|대괄호|토큰",
    re.IGNORECASE,
)
"""Signs and words of a conversation that is about tags and brackets."""
_OF_COMMANDS = re.compile(
    r"(?<![a-z])(?:shell|terminal|command[ -]?lines?|bash|git|docker|kubectl|regex)(?![a-z])|\busage:|명령어|터미널|정규식",
    re.IGNORECASE,
)
_OF_TEMPLATES = re.compile(
    r"(?<![a-z])(?:placeholders?|templates?|templating|jinja2?|mustache|handlebars|django|liquid|angular|vue|react|jsx|latex|syntax"
    r"|f-strings?|format strings?|curly|braces|variables?|interpolat\w{1,4}|regex|git|docker|kubectl)(?![a-z])"
    r"|템플릿|서식|양식|자리 ?표시자|플레이스홀더|변수|중괄호|괄호|치환|문법",
    re.IGNORECASE,
)
"""Words of a conversation that is about variables in braces, or asks for a text with gaps."""
_PLACEHOLDERS: tuple[tuple[re.Pattern[str], tuple[re.Pattern[str], ...]], ...] = (
    (_NO_CELL_INSIDE, ()),
    (_CUT_MEDIUM, (_OF_MARKUP,)),
    (_CUT_ENTITY, (_OF_MARKUP, _OF_COMMANDS)),
    (_UNFILLED, (_OF_TEMPLATES,)),
)
"""Each kind, and what a conversation speaks of in which the same signs are none."""
_SIGNS = re.compile(r"[<\[{]|NAME_\d|#@|&[a-z-]+\d*&")
_MASK_SIGNS = ("○", "◯", "〇", "△", "◇", "□", "OO", "XX", "××", "ＯＯ", "ＸＸ", "xxx", "***")
"""Without one of these no pattern is looked for, which takes much longer."""


def placeholder(record: Chat) -> str | None:
    """What was taken out of a turn or never filled in, or a turn that is the word of an export for an empty cell."""
    for place, turn in enumerate(turns_of(record)):
        if len(turn.content) <= _LONGEST_NOTHING and turn.role in ("user", "assistant") and _is_no_cell(turn, first=place == 0):
            return turn.content
    texts = _texts(record)
    signed = [text for text in texts if _SIGNS.search(text)]
    for pattern, subjects in _PLACEHOLDERS if signed else ():
        found = _first(pattern, signed)
        if found is not None and not any(subject.search(text) for subject in subjects for text in texts):
            return found
    return None


def _is_no_cell(turn: Message, first: bool) -> bool:
    """Whether a turn is nothing but the word of an export; nobody begins a conversation with "none", but many go on with it."""
    return bool(_NO_CELL.fullmatch(turn.content) or (first and turn.role == "user" and _NOTHING.fullmatch(turn.content)))


def empty_answer(record: Chat) -> str | None:
    """An answer that is a word for nothing, where no question or system turn names that word among the answers to choose from."""
    for answer in learned(record):
        if len(answer) <= _LONGEST_NOTHING and (found := _NOTHING.fullmatch(answer)):
            asked = "\n".join(turn.content for turn in turns_of(record) if turn.role in ("system", "user")).lower()
            if not re.search(rf"(?<![a-z]){re.escape(found[1].lower())}(?![a-z])", asked):
                return answer
    return None


def blank(record: Chat) -> str | None:
    """What a reader is to fill in."""
    return _first(_BLANK, [text for text in _texts(record) if "[" in text or "<" in text])


def mask(record: Chat) -> str | None:
    """Signs for a name or a number that its writer does not give."""
    texts = _texts(record)
    whole = "\n".join(texts)
    for sign in _MASK_SIGNS:
        if sign in whole:
            return next((found[0] for text in texts if (found := _MASK.search(text))), None)
    return None


def turns_of(record: Chat) -> Sequence[Message]:
    """Everything that a record holds."""
    if isinstance(record, Conversation):
        return record.messages
    return (*record.prompt, Message("assistant", record.chosen), Message("assistant", record.rejected))


def learned(record: Chat) -> list[str]:
    """Answers that a model is made to give."""
    if isinstance(record, PreferencePair):
        return [record.chosen]
    if record.good is False:
        return []
    return [turn.content for turn in record.messages if turn.role == "assistant" and turn.is_trained]


def _first(pattern: re.Pattern[str], texts: Sequence[str]) -> str | None:
    """The first place outside code where a pattern is found."""
    for text in texts:  # looking for code takes longer than looking for a gap
        if pattern.search(text) and (found := pattern.search(without_code(text))):
            return found[0]
    return None


def _texts(record: Chat) -> list[str]:
    return [turn.text if turn.reasoning else turn.content for turn in turns_of(record)]
