"""Whether a chat is in its source's language: prose is judged, and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.cleaning.filters import QualityFilter, disguised_letters
from keural.data.filtering.gates import Gatekeeper
from keural.data.filtering.languages import hangul_share
from keural.data.filtering.prose import disguised_words, prose_of
from keural.data.records import Conversation, PreferencePair
from keural.recipe import SourceSpec
from keural.tokenizer.message import Message

QUESTION = "다음 내용을 정리해서 알려 주세요."
ENGLISH = "This answer was never translated and stayed in the other language."
KOREAN = "이 대답은 번역되지 않은 채로 다른 언어에 그대로 남아 있습니다."


def found(question: str, answer: str, language: str) -> list[tuple[str, str]]:
    record = Conversation((Message("user", question), Message("assistant", answer)), "w", language)
    return list(Gatekeeper(SourceSpec(name="s", adapter="messages"), {}).findings(record, "drop"))


KEPT_KOREAN = [
    (QUESTION, json.dumps({"title": "a long enough title in a field", "items": ["first of them", "second of them"]})),
    (QUESTION, '결과입니다.\n\n[{"name": "Bori", "kind": "a small dog with brown ears"}]'),
    (QUESTION, "```python\nfor number in range(10):\n    print('the number is', number)\n```"),
    (QUESTION, "def add(first, second):\n    # the sum of both numbers\n    return first + second"),
    (QUESTION, "import numpy as np\nvalues = np.zeros((3, 3))\nprint(values.sum())"),
    (QUESTION, "SELECT name, address FROM customers\nWHERE age > 30\nORDER BY name;"),
    (QUESTION, "pip install datasets transformers\ngit clone https://example.org/a/very/long/name.git"),
    (QUESTION, "name: Bori\nkind: small brown dog\nowner: the lighthouse keeper"),
    (QUESTION, "https://example.org/a/very/long/path/with/words/in/it?and=more"),
    (QUESTION, "<ul><li class='first entry of all'>하나</li></ul>"),
    (QUESTION, r"$$\sum_{value} probability(value) \log probability(value)$$"),
    (QUESTION, '{"name": "Bori", "description": "a small brown dog that likes the sea", "tail": ["cut'),
    (QUESTION, "{'name': 'Bori', 'description': 'a small brown dog that likes the sea'}"),
    (QUESTION, "pet:\n  name: Bori\n  places:\n    - the house by the harbour\n    - the other house"),
    (QUESTION, "name,kind,colour\nBori,dog,brown\nNabi,cat,white\nToto,parrot,green"),
    (QUESTION, "<!DOCTYPE html>\n<html>\n<head><title>All about the dogs and cats</title></head>\n</html>"),
    (QUESTION, '#!/bin/bash\nfor file in *.txt; do\n  echo "now processing $file"\ndone'),
    (QUESTION, "public class Pet {\n    private final String name;\n    public Pet(String name) { this.name = name; }\n}"),
    ("GPT는 무엇의 약자인가요?", "Generative Pre-trained Transformer"),
    ("이 영화의 감독과 배우는?", "Bong Joon-ho, Song Kang-ho, Cho Yeo-jeong"),
    ("다음 문장을 영어로 옮기세요: 오늘은 비가 온다.", "It has been raining the whole day today."),
    ("회의를 미루자는 영문 메일을 써 주세요.", "Could we please move our meeting to Thursday morning?"),
    ("다음을 번역하세요: The kettle has been on the stove for an hour.", "주전자가 한 시간째 불 위에 있다."),
    ("아래 글을 한 문장으로 요약하세요.\n\n" + ENGLISH * 5, "번역되지 않은 대답에 대한 글이다."),
    (QUESTION, "예"),
    (QUESTION, "A"),
]
DROPPED_KOREAN = [
    (QUESTION, ENGLISH, "answer"),
    (QUESTION, "Here is what you asked for: the three points of the text.\n```python\nx = 1\n```", "answer"),
    (QUESTION, "Title: the second of three\nSummary: nothing was translated into the other language", "answer"),
    (QUESTION, "The pet is brown, small, loud\nand the other is white, large, quiet", "answer"),
    (QUESTION, "It is <b>very</b> important to say that nothing of it was translated.", "answer"),
    (ENGLISH, KOREAN, "question"),
    (
        "낱말의 뜻을 견주어 주세요.",
        "- mishap: it is said of a small thing that went wrong on some day, and that nobody meant to go wrong.\n"
        "- disaster: it is said of a large thing that went wrong, and that many people remember long afterwards.",
        "answer",
    ),
    ("누가 밥을 먹나요?", "The chicken is going to eat.", "answer"),
    ("머리글자를 맞춰 주세요.", "David dons a derby daily.", "answer"),
    ("영어 공부가 어려워요.", "You should read a little every day and never give up on it.", "answer"),
    (QUESTION, "この答えは日本語で書かれているので韓国語ではありません。", "answer"),
]
KEPT_ENGLISH = [
    ("Write hello in JSON.", json.dumps({"인사": "안녕하세요 여러분 반갑습니다 모두들"}, ensure_ascii=False)),
    ("How do you say good morning in Korean?", "좋은 아침입니다, 잘 지내셨어요? 안녕히 주무셨습니까?"),
    ("Translate into Korean: " + ENGLISH, KOREAN),
    ("What does this sentence mean in plain words?\n" + KOREAN * 2, "That the answer was not translated."),
    ("What is Hangul?", "Hangul (한글) is the Korean alphabet, made known in 1446."),
    ("Ça va?", "Très bien, merci. Et toi, qu'est-ce que tu fais?"),
    ("Give the formula.", "E = mc², with λ in μm and Δx > 0 for every ε."),
    ("Who wrote it?", "Фёдор Достоевский wrote it, in Russian: Преступление. It was printed in a journal in twelve parts."),
]
DROPPED_ENGLISH = [
    ("Name a tree that grows here.", KOREAN, "not_english"),
    (KOREAN, "It was not translated.", "not_english"),
    ("Tell me about it, please.", "Этот ответ написан на другом языке целиком.", "not_english"),
    ("Tell me about it, please.", "これは英語ではない答えです。とても長い答えです。", "not_english"),
    ("Tell me about it, please.", "Тhe quiсk brоwn fоx jumps оver the lаzy dog.", "disguised_letters"),
    ("Tell me about it, please.", "Ｔｈｅ quick brown ｆｏｘ jumps over the lazy dog.", "disguised_letters"),
    ("Tell me about it, please.", "𝐓𝐡𝐞 quick 𝐛𝐫𝐨𝐰𝐧 fox jumps over the lazy dog.", "disguised_letters"),
]


@pytest.mark.parametrize(("question", "answer"), KEPT_KOREAN)
def test_code_json_names_and_translations_leave_a_chat_korean(question: str, answer: str) -> None:
    assert found(question, answer, "ko") == []


@pytest.mark.parametrize(("question", "answer", "side"), DROPPED_KOREAN)
def test_prose_in_another_language_is_not_korean(question: str, answer: str, side: str) -> None:
    (finding,) = found(question, answer, "ko")
    assert finding.reason == "not_korean"
    assert finding.detail.startswith(f"{side} '")


@pytest.mark.parametrize(("question", "answer"), KEPT_ENGLISH)
def test_quoted_and_wanted_korean_leaves_a_chat_english(question: str, answer: str) -> None:
    assert found(question, answer, "en") == []


@pytest.mark.parametrize(("question", "answer", "reason"), DROPPED_ENGLISH)
def test_other_scripts_are_not_english(question: str, answer: str, reason: str) -> None:
    assert [finding.reason for finding in found(question, answer, "en")] == [reason]


def test_each_answer_of_a_pair_is_judged() -> None:
    keeper = Gatekeeper(SourceSpec(name="s", adapter="preference"), {})
    for chosen, rejected in ((KOREAN, ENGLISH), (ENGLISH, KOREAN)):
        assert list(keeper.reasons(PreferencePair((Message("user", QUESTION),), chosen, rejected, "w", "ko"), "drop")) == [
            "not_korean"
        ]


def test_hangul_share() -> None:
    assert hangul_share("짧다") is None
    assert hangul_share("가" * 15 + "a" * 5 + " 123 `code is left out`") == 0.75


@pytest.mark.parametrize(
    ("text", "prose"),
    [
        ("앞 `code` 뒤", "앞 뒤"),
        ('여기 {"key": ["a", {"b": 1}]} 끝', "여기 끝"),
        ("[링크](https://example.org/a) 참고", "링크 참고"),
        ("x = 3이므로 답은 5이다.", "x = 3이므로 답은 5이다."),
        ("# 합계를 구한다\ntotal = first + second\nprint(total)", "# 합계를 구한다"),
        ("<b>굵게</b> 쓰려면", "굵게 쓰려면"),
        ("I came; I saw {nothing}; I left.", "I came; I saw {nothing}; I left."),
        ("See [x] and {a, b}.", "See [x] and {a, b}."),
        ("아직 {열려 있는", "아직 {열려 있는"),
        ("snake_case 변수와 camelCase 변수", "변수와 변수"),
    ],
)
def test_what_is_prose(text: str, prose: str) -> None:
    assert " ".join(prose_of(text).split()) == prose


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('abc xyz가나"\\', max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abcxyz", max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(JSON.filter(lambda value: isinstance(value, dict | list) and value), st.booleans())
def test_a_korean_question_answered_in_json_is_korean_whatever_the_json_holds(value: object, indented: bool) -> None:
    answer = json.dumps(value, ensure_ascii=False, indent=2 if indented else None)
    assert found(QUESTION, answer, "ko") == []
    assert found(QUESTION, f"결과는 이렇습니다.\n{answer}", "ko") == []


def test_words_with_letters_of_two_scripts() -> None:
    assert disguised_words("plain words, naïve café") == (4, [])
    assert disguised_words("раypal раypal.com Москва wоrd") == (4, ["раypal", "раypal", "wоrd"])
    assert disguised_words("API를 AI는 GPU가") == (2, []), "Hangul after Latin letters is Korean grammar"
    assert disguised_words("μm Δx ε Ωm Εt") == (0, [])


LEAD = "The keeper of the lighthouse walked down to the harbour that morning, because the boats had come in early. "
DISGUISED = LEAD.replace("the ", "thе ").replace("a", "а")


def test_an_english_document_in_disguise_is_dropped_and_a_russian_name_is_not() -> None:
    from datatrove.data import Document

    documents = {
        DISGUISED * 3: (False, "disguised_letters"),
        LEAD.replace("lighthouse", "ｌｉｇｈｔｈｏｕｓｅ") * 3: (False, "disguised_letters"),
    }
    for text, expected in documents.items():
        assert QualityFilter().filter(Document(text=text, id="1", metadata={"kind": "en"})) == expected
    assert disguised_letters(LEAD * 20 + "It was Сергей's wоrk.") is None, "one slip in a long text"
    assert disguised_letters(LEAD + "Москва, 東京, Αθήνα, 서울") is None
