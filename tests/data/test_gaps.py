"""Gaps in chats: what is one, what only looks like one, in Korean and in English."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.adapters import ADAPTERS
from keural.data.filtering.gates import Gatekeeper
from keural.data.records import Conversation, PreferencePair
from keural.recipe import SourceSpec
from keural.tokenizer.message import Message

GAPS = ("placeholder", "empty_answer", "blank", "masked_name")


def chat(question: str, answer: str, system: str = "") -> Conversation:
    turns = (Message("system", system),) if system else ()
    return Conversation((*turns, Message("user", question), Message("assistant", answer)), "w")


def gaps_in(record: Conversation | PreferencePair) -> list[tuple[str, str]]:
    """Every gap that is found in a record, as its reason and what is shown of it."""
    keeper = Gatekeeper(SourceSpec(name="s", adapter="messages"), {})
    found = [finding for action in ("drop", "count") for finding in keeper.findings(record, action)]
    return [(finding.reason, finding.detail) for finding in found if finding.reason in GAPS]


def reasons_in(record: Conversation | PreferencePair) -> list[str]:
    return [reason for reason, _ in gaps_in(record)]


PLACEHOLDERS = [
    ("Who are you?", "I am {{name}}, made by {{author}}."),
    ("너는 누구니?", "저는 {{이름}}이고 {{ 회사 }}에서 만들었습니다."),
    ("Write a haiku about {topic}.", "Leaves drift on the pond."),
    ("{질문}", "네, 바로 알려 드리겠습니다."),
    ("{이름}님, 안녕하세요.", "네, 안녕하세요."),
    ("{{question}}", "{{answer}}"),
    ("{instruction}\n{input}", "Gladly."),
    ("Write a letter (a short one) to {{name}}", "With pleasure."),
    ("Say hello.", "Dear {CUSTOMER_NAME}, hello."),
    ("Say hello.", "Hello {user_name}, nice to meet you!"),
    ("Say hello.", "Hello ${name}!"),
    ("What does the speaker say? <audio>", "He asks for the way."),
    ("<image>\n이 사진에는 무엇이 있나요?", "언덕 위에 집이 한 채 있습니다."),
    ("<|image_pad|> What is this?", "A kite."),
    ("Compare <image_1> and <image_2>.", "The first is darker."),
    ("What does it look like?", "Like this: [image]"),
    ("<image>\nWhich shell is this, and what are the variables of its shape?", "A whelk's."),
    ("Fill the template in with what you hear: <audio>", "It rains."),
    ("어떻게 생겼어?", "[사진] 이렇게 생겼어요."),
    ("Who called?", "It was <PERSON>, from <LOCATION>."),
    ("Who called?", "[PERSON_2] called at noon."),
    ("Write to her.", "Dear NAME_1, thank you for the parcel."),
    ("누가 왔어?", "#@이름#씨가 왔어요."),
    ("어디서 봤어?", "#@URL# 여기요."),
    ("누가 왔어?", "&name2& 씨가 왔어요."),
    ("Add the numbers.\n\n<noinput>", "Which ones?"),
    ("Add the numbers.", "<nooutput>"),
    ("Add the numbers.", "<no-output>"),
    ("N/A", "How can I help?"),
    ("없음", "무엇을 도와드릴까요?"),
]
NO_PLACEHOLDERS = [
    # tags, in code and out of it
    ("Turn this XML into JSON.\n\n<pet><name>Bori</name></pet>", '{"pet": {"name": "Bori"}}'),
    ("What does an RSS item hold?", "```xml\n<item><LINK>https://example.org</LINK></item>\n```"),
    ("What is <number> in HTML?", "Not a tag that exists."),
    ("How do I play a sound on a page?", "Put an <audio> tag into it."),
    ("HTML에서 <image>와 <img>는 무엇이 다른가요?", "<image>는 표준이 아닙니다."),
    ("Center this <div>.", "Give its parent `display: grid`."),
    ("Which <MASK> token does BERT use?", "Its own."),
    ("Write an SVG.", '<svg><image href="a.png"/></svg>'),
    ("How do I copy a repository?", "Run git clone <URL> in a shell."),
    ("What is <NAME> in `git checkout <NAME>`?", "A branch."),
    ("명령어를 알려 줘.", "docker stop <NAME> 이라고 쓰세요."),
    # links and words in brackets
    ("How do I write a Markdown link?", "Write [link](https://example.org) with the text in brackets."),
    ("Where is it?", "See [image](a.png), [url][1] and [the docs](https://example.org).\n\n[url]: https://example.org"),
    ("출처는?", "[한겨레] 기사에 있습니다. [link](https://example.org)"),
    ("What did the crowd do?", "[laughs] They stayed."),
    # braces that hold something
    ("What is the union of A and B?", "{Total} = {both} + {neither}, a set like {1, 2}."),
    ("Typeset a fraction.", r"Here: \frac{x}{date}, $\text{name}_{text}$ and \begin{document}a\end{document}."),
    ("Print a name in Python.", 'name = input()\nprint(f"Hello, {name}")'),
    ("Print a name in Python.", "Use an f-string: `f'{name}'`."),
    ("이름을 출력해 줘.", '```python\nprint(f"{name}님")\n```'),
    ("How do I show a variable in Jinja?", "Write {{ name }}."),
    ("고객에게 보낼 템플릿을 써 줘.", "{{이름}}님, 안녕하세요."),
    ("Write a mail template for new users.", "Hello {name}, welcome!"),
    ("GitHub Actions?", "Use ${{ github.ref }} there."),
    # words for nothing that are said
    ("Do you have pets?", "None of them is mine."),
    ("가진 게 있어?", "아무것도 없음을 알았습니다."),
    # a question's own gaps
    ("Fill in: The cat sat on the ____.", "mat"),
    ("Name a tree.", "An oak."),
]


@pytest.mark.parametrize(("question", "answer"), PLACEHOLDERS)
def test_what_was_cut_out_or_never_filled_in_is_a_placeholder(question: str, answer: str) -> None:
    assert "placeholder" in reasons_in(chat(question, answer))


@pytest.mark.parametrize(("question", "answer"), NO_PLACEHOLDERS)
def test_tags_links_sets_and_templates_that_are_spoken_of_are_none(question: str, answer: str) -> None:
    assert gaps_in(chat(question, answer)) == []


def test_the_rejected_answer_is_looked_at_too() -> None:
    assert reasons_in(PreferencePair((Message("user", "Who?"),), "Me.", "It was <PERSON>.", "w")) == ["placeholder"]


def test_tool_definitions_and_their_results_are_no_gaps() -> None:
    system = 'Be brief.\n\n<tools>\n{"name": "find", "parameters": {"name": {"type": "string"}}}\n</tools>'
    turns = (
        Message("system", system),
        Message("user", "Who is at home?"),
        Message("assistant", '<tool_call>\n{"name": "find", "arguments": {"name": "all"}}\n</tool_call>'),
        Message("tool", "none"),
        Message("assistant", "Nobody."),
    )
    assert gaps_in(Conversation(turns, "w")) == []
    spoken = Conversation((*turns[:-1], Message("assistant", "It is <PERSON>.")), "w")
    assert reasons_in(spoken) == ["placeholder"], "the tags of tools are no talk of tags"


def test_a_user_may_answer_none_in_the_middle() -> None:
    turns = (Message("user", "Two or three?"), Message("assistant", "What would you like?"), Message("user", "none"))
    assert gaps_in(Conversation((*turns, Message("assistant", "As you like.")), "w")) == []


@pytest.mark.parametrize(
    "answer", ["none", "None.", "N/A", "n/a", "null", "NaN", "TBD", "없음", "없음.", "해당 없음", "해당사항 없음"]
)
def test_a_word_for_nothing_as_an_answer_is_counted_and_kept(answer: str) -> None:
    keeper = Gatekeeper(SourceSpec(name="s", adapter="qa"), {})
    record = chat("이 가게는 친절해요", answer)
    assert list(keeper.findings(record, "drop")) == []
    assert reasons_in(record) == ["empty_answer"]


@pytest.mark.parametrize(
    ("question", "answer", "system"),
    [
        ("Is this hateful? Answer none, mild or hate: You are kind.", "none", ""),
        ("You are kind.", "None", "Classify the text as hate, offensive or none."),
        ("알레르기가 있나요? (있음/없음)", "없음", ""),
        ("혐오 표현이면 '혐오', 아니면 '해당 없음'이라고 답하세요.", "해당 없음", ""),
        ("What does `print(None)` show?", "None", ""),
        ("In which list is the card: todo, doing or done?", "todo", ""),
    ],
)
def test_a_label_that_the_question_names_is_an_answer(question: str, answer: str, system: str) -> None:
    assert gaps_in(chat(question, answer, system)) == []


@pytest.mark.parametrize(
    "answer",
    [
        "Best regards,\n[Your Name]",
        "Dear [Recipient's Name],",
        "[INSERT DATE HERE] in the hall",
        "Dear [hiring manager's name], I apply to [Company Name].",
        "안녕하세요, [이름]입니다.",
        "[귀하의 이름] 드림",
        "[회사명]에 지원합니다.",
        "<회사명>에 지원한 <신청자 이름>입니다.",
        "Meet me at <insert address>.",
    ],
)
def test_what_a_reader_is_to_fill_in_is_counted_and_kept(answer: str) -> None:
    keeper = Gatekeeper(SourceSpec(name="s", adapter="qa"), {})
    record = chat("Write the letter.", answer)
    assert list(keeper.findings(record, "drop")) == []
    assert reasons_in(record) == ["blank"]


@pytest.mark.parametrize(
    "answer",
    [
        "[laughs] I am.",
        "names[name] = 3",
        "[Name](https://example.org) is here.",
        "[출처] 한겨레",
        "see [1] and [a, b]",
        "`[Your Name]`",
    ],
)
def test_other_words_in_brackets_are_not(answer: str) -> None:
    assert gaps_in(chat("Go on.", answer)) == []


@pytest.mark.parametrize(
    "answer", ["김○○ 씨가 왔다.", "이 ○○ 박사", "OO시에 산다.", "XX 아파트 앞", "번호는 010-XXXX-XXXX이다.", "정△△ 형사"]
)
def test_signs_for_a_name_are_counted_and_kept(answer: str) -> None:
    keeper = Gatekeeper(SourceSpec(name="s", adapter="qa"), {})
    record = chat("누구야?", answer)
    assert list(keeper.findings(record, "drop")) == []
    assert reasons_in(record) == ["masked_name"]


@pytest.mark.parametrize(
    "answer",
    [
        "ㅇㅇ 맞아",
        "○ 첫째 조건",
        "● 요점",
        "**굵은 글씨**는 이렇게",
        "f*** you",
        "Chapter XXX. The end",
        "XX 염색체",
        "O/X 퀴즈",
        "3×4",
        "하나*둘",
    ],
)
def test_bullets_oaths_and_numerals_are_no_masks(answer: str) -> None:
    assert gaps_in(chat("뭐야?", answer)) == []


def test_what_was_found_is_shown() -> None:
    assert gaps_in(chat("Who?", "I am {{name}}.")) == [("placeholder", "'{{name}}'")]
    assert gaps_in(chat("Who?", "N/A")) == [("empty_answer", "'N/A'")]


def test_every_gap_can_be_dropped_counted_or_skipped() -> None:
    record = chat("Who?", "[Your Name] and {{name}} and 김○○ 씨")
    names = {"placeholders": "placeholder", "blanks": "blank", "masked_names": "masked_name"}
    for gate, reason in names.items():
        for action in ("drop", "count", "skip"):
            keeper = Gatekeeper(SourceSpec(name="s", adapter="messages", gates={gate: action}), ADAPTERS["messages"].gates)
            assert (reason in keeper.reasons(record, "drop")) == (action == "drop")
            assert (reason in keeper.reasons(record, "count")) == (action == "count")


WORDS = st.text("bdhkw가나다라ÀЖ", min_size=1, max_size=8)


@given(
    st.lists(WORDS, min_size=1, max_size=8), st.integers(0, 7), st.sampled_from(["{{name}}", "<PERSON>", "[image]", "<nooutput>"])
)
def test_a_placeholder_is_found_wherever_it_stands_in_prose_and_nowhere_in_code(words: list[str], place: int, gap: str) -> None:
    text = " ".join([*words[:place], gap, *words[place:]])
    assert "placeholder" in reasons_in(chat("q", text))
    assert "placeholder" not in reasons_in(chat("q", f"```\n{text}\n```"))
    assert "placeholder" not in reasons_in(chat("q", " ".join(words)))
