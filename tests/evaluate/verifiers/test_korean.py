"""Korean instructions: right and wrong answers of every kind, and the hard endings of Korean sentences."""

import re
import unicodedata
from typing import Any

import pytest

from keural.evaluate.verifiers import KOREAN, parse_instructions, verdicts
from keural.evaluate.verifiers.korean_items import korean_items
from keural.evaluate.verifiers.korean_text import level_of, levels, sentences

Case = tuple[str, dict[str, Any], list[str], list[str]]
CASES: list[Case] = [
    (
        "length:characters",
        {"count": 5, "relation": "at most", "with_spaces": False},
        ["가나 다라마", "가나다"],
        ["가나다라마바", "가 나 다 라 마 바"],
    ),
    (
        "length:characters",
        {"count": 6, "relation": "exactly", "with_spaces": True},
        ["가나 다라마", "  가나다라마바\n"],
        ["가나다라마", "가나 다라마바"],
    ),
    ("length:characters", {"count": 2, "relation": "exactly", "with_spaces": True}, ["\u1100\u1161\u11a8자"], ["각"]),
    (
        "length:words",
        {"count": 3, "relation": "at least"},
        ["나는 밥을 먹었다.", "나는 오늘 밥을 먹었다"],
        ["밥을 먹었다.", "밥 - 먹었다 !"],
    ),
    (
        "length:sentences",
        {"count": 2, "relation": "exactly"},
        [
            "비가 와요. 우산을 챙기세요!",
            "비가 와요\n우산을 챙기세요",
            "값은 3.14입니다. 맞나요?",
            "2024. 3. 5.에 만나요. 꼭이요!",
            '그가 "가자. 어서."라고 말했다. 우리는 갔다.',
        ],
        ["비가 와요.", "하나. 둘. 셋.", "정말?! 그래? 응."],
    ),
    (
        "length:paragraphs",
        {"count": 2},
        ["첫째.\n\n둘째.", "첫째.\n둘째 줄.\n \n둘째 단락."],
        ["첫째.\n둘째.", "가.\n\n나.\n\n다."],
    ),
    ("length:lines", {"count": 3}, ["가\n나\n다", "가\n\n나\n다\n"], ["가\n나", "가 나 다"]),
    (
        "speech:polite",
        {},
        [
            "안녕하세요. 오늘은 비가 옵니다.",
            "네, 그렇죠.",
            "그건 제가 할게요~",
            "# 제목\n\n- 사과\n- 배\n\n맛있게 드십시오.",
            "같이 갑시다!",
            "정말 좋아요ㅎㅎ",
            '그는 "밥 먹었어?"라고 물었어요.',
            "준비물: 물, 빵\n꼭 챙기세요 😊",
            "한번 해 보시겠습니까?",
            "좋아요(정말로).",
        ],
        [
            "안녕. 오늘은 비가 온다.",
            "오늘은 비가 와.",
            "오늘은 비가 옵니다. 우산 챙겨.",
            "그러니까.",
            "수요가 많다.",
            "지금 가자.",
            "물이 필요",
            "이 책은 친구가 아니다.",
        ],
    ),
    (
        "speech:casual",
        {},
        [
            "오늘은 비가 와. 우산 챙겨!",
            "나는 학생이다.",
            "그러니까 말이지.",
            "뭐 먹을래?",
            "정말 좋구나.",
            '그 사람이 "감사합니다."라고 했어.',
        ],
        ["오늘은 비가 와요.", "나는 학생입니다.", "비가 와. 우산 챙기세요.", "사과, 배", "그렇죠."],
    ),
    (
        "speech:haeyo",
        {},
        ["비가 와요. 우산을 챙기세요.", "그렇죠!", "아니에요. 괜찮아요."],
        ["비가 옵니다.", "비가 와요. 조심하십시오.", "비가 와."],
    ),
    (
        "speech:hapsyo",
        {},
        ["비가 옵니다. 조심하십시오.", "함께 갑시다.", "어떻습니까?"],
        ["비가 와요.", "비가 옵니다. 그렇죠?", "그러니까.", "이것이 아니다."],
    ),
    ("speech:plain", {}, ["비가 온다. 땅이 젖었다.", "그것은 책이 아니다."], ["비가 옵니다.", "비가 와.", "비가 온다. 그렇지?"]),
    ("speech:ending", {"ending": "다냥"}, ["비가 온다냥. 우산을 쓴다냥!"], ["비가 온다. 우산을 쓴다냥.", "비가 온다냥. 좋아요."]),
    ("words:forbidden", {"words": ["사과", "apple"]}, ["배를 먹었다."], ["사과를 먹었다.", "Apple 주스", "풋사과"]),
    ("words:required", {"words": ["가을", "단풍"]}, ["가을에는 단풍이 든다."], ["가을이 왔다.", "단풍"]),
    ("words:frequency", {"word": "별", "count": 3, "relation": "at least"}, ["별 하나, 별 둘, 별 셋"], ["별 하나, 별 둘"]),
    (
        "form:bullets",
        {"count": 2},
        ["- 하나\n- 둘", "목록:\n• 하나\n• 둘\n끝"],
        ["- 하나", "-하나 -둘", "- 하나\n- 둘\n- 셋", "1. 하나\n2. 둘"],
    ),
    (
        "form:numbered",
        {"count": 3},
        ["1. 하나\n2. 둘\n3. 셋", "1) 하나\n2) 둘\n3) 셋"],
        ["1. 하나\n2. 둘", "1. 하나\n1. 둘\n1. 셋", "- 하나\n- 둘\n- 셋"],
    ),
    (
        "form:json",
        {"keys": ["이름", "나이"]},
        ['{"이름": "민수", "나이": 3}', '```json\n{"나이": 3, "이름": "민수"}\n```'],
        [
            '{"이름": "민수"}',
            "이름: 민수, 나이: 3",
            '{"이름": 1, "나이": 2, "키": 3}',
            '[{"이름": 1, "나이": 2}]',
            '{"이름": 1, "이름": 2, "나이": 3}',
            "{'이름': 1}",
        ],
    ),
    ("form:title", {}, ["<<봄>>\n꽃이 핀다."], ["봄\n꽃이 핀다.", "<< >>"]),
    (
        "form:title_line",
        {"word": "제목"},
        ["제목: 봄날\n꽃이 핀다.", "# 제목: 봄날\n\n꽃이 핀다.", "**제목:** 봄날\n꽃"],
        ["제목: 봄날", "봄날\n꽃이 핀다.", "제목:\n꽃이 핀다.", "꽃\n제목: 봄날"],
    ),
    (
        "form:table",
        {"columns": 2, "rows": 2},
        ["| 이름 | 값 |\n|---|---|\n| 가 | 1 |\n| 나 | 2 |", "표입니다.\n\n|이름|값|\n|:--|--:|\n|가|1|\n|나|2|"],
        [
            "| 이름 | 값 |\n| 가 | 1 |\n| 나 | 2 |",
            "| 이름 | 값 |\n|---|---|\n| 가 | 1 |",
            "이름 값\n가 1\n나 2",
            "| 가 | 나 | 다 |\n|---|---|---|\n| 1 | 2 | 3 |\n| 1 | 2 | 3 |",
        ],
    ),
    (
        "form:sections",
        {"word": "단계", "count": 2},
        ["단계 1\n물을 끓인다.\n단계 2\n면을 넣는다.", "## 단계 1\n가\n**단계 2**\n나"],
        ["단계 1\n가", "1단계\n가\n2단계\n나", "단계 2\n가\n단계 1\n나"],
    ),
    ("form:highlights", {"num_highlights": 2}, ["**하나**와 **둘**", "*하나* *둘*"], ["*하나*", "하나 둘", "** **"]),
    ("form:placeholders", {"num_placeholders": 2}, ["[이름]님께, [날짜]에 뵙겠습니다."], ["[이름]님께", "이름님께"]),
    ("form:two_answers", {}, ["첫째 답\n******\n둘째 답"], ["첫째 답", "같다\n******\n같다", "가\n******\n나\n******\n다"]),
    (
        "form:one_of",
        {"options": ["예", "아니요", "모르겠습니다"]},
        ["예", "예.", '"모르겠습니다"', " 아니요\n"],
        ["예, 맞습니다.", "네", "예 아니요"],
    ),
    (
        "form:acrostic",
        {"word": "바나나"},
        [
            "바람이 분다\n나는 걷는다\n나무가 흔들린다",
            "바: 바람이 분다\n나: 나는 걷는다\n나: 나무 아래",
            "바 - 바다\n나 - 나비\n나 - 나무",
        ],
        ["바람이 분다\n나는 걷는다", "바람\n나비\n다람쥐", "나비\n바람\n나무"],
    ),
    ("script:hangul_only", {}, ["오늘은 3월이다!", "ㅋㅋ 좋아"], ["오늘은 March이다", "오늘은 三월이다", "123"]),
    ("script:no_latin", {}, ["컴퓨터가 좋다", "漢字와 한글"], ["PC가 좋다", "ｐｃ가 좋다", "카페 é"]),
    ("script:no_digits", {}, ["세 번 갔다", "삼월 오일", "三月"], ["3번 갔다", "３번", "①번", "Ⅳ장", "x²"]),
    ("script:no_hanja", {}, ["학교에 갔다", "school에 갔다 1"], ["學校에 갔다", "경제(經濟)", "々"]),
    ("marks:no_comma", {}, ["사과 그리고 배"], ["사과, 배", "사과、배", "사과，배", "1,000원"]),
    ("marks:no_exclamation", {}, ["좋습니다."], ["좋습니다!", "좋습니다！"]),
    ("marks:no_emoji", {}, ["좋습니다.", "별표 없이"], ["좋습니다 😊", "좋아요 ^^", "ㅋㅋㅋ", "좋아요 ㅠㅠ", "☀ 맑음"]),
    (
        "marks:quoted",
        {},
        ['"좋습니다."', "“좋습니다.”", "「좋습니다」"],
        ["좋습니다.", '"좋습니다.', '“좋습니다."', '""', "'좋습니다.'"],
    ),
    ("place:start_phrase", {"phrase": "먼저"}, ["먼저 물을 끓인다.", '"먼저 물을 끓인다."'], ["물을 먼저 끓인다."]),
    (
        "place:end_phrase",
        {"phrase": "이상입니다."},
        ["물을 끓입니다. 이상입니다.", '"끝. 이상입니다."', "**이상입니다.**"],
        ["이상입니다. 감사합니다.", "이상입니다", "이상 입니다."],
    ),
    ("place:last_is_question", {}, ["비가 온다. 우산 있니?", "우산 있으세요?”"], ["우산 있니? 비가 온다.", "우산 있니."]),
    (
        "place:postscript",
        {"marker": "추신"},
        ["잘 지내.\n추신: 곧 보자.", "잘 지내.\n\n**추신** 곧 보자"],
        ["추신: 곧 보자.", "잘 지내. 추신 없음", "잘 지내.\n추신:"],
    ),
]


@pytest.mark.parametrize(
    ("kind", "arguments", "right", "wrong"), CASES, ids=[f"{case[0]}-{place}" for place, case in enumerate(CASES)]
)
def test_right_answers_follow_and_wrong_ones_do_not(
    kind: str, arguments: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    instructions = parse_instructions(KOREAN, [kind], [arguments], "row")
    assert [answer for answer in right if not verdicts(KOREAN, instructions, answer).all_strict] == []
    assert [answer for answer in wrong if verdicts(KOREAN, instructions, answer).all_strict] == []


def test_every_kind_has_cases() -> None:
    assert {case[0] for case in CASES} == set(KOREAN)


@pytest.mark.parametrize(
    ("sentence", "level"),
    [
        ("갑니다.", "hapsyo"),
        ("합니까?", "hapsyo"),
        ("가십시오", "hapsyo"),
        ("합시다!", "hapsyo"),
        ("아닙니다.", "hapsyo"),
        ("했습니다만", None),
        ("가니까.", "casual"),
        ("아니다.", "plain"),
        ("다니다.", "plain"),
        ("지나다.", "plain"),
        ("모시다.", "plain"),
        ("가요.", "haeyo"),
        ("그렇죠?", "haeyo"),
        ("아니요.", "haeyo"),
        ("네!", "haeyo"),
        ("먹는데요…", "haeyo"),
        ("제가요?", "haeyo"),
        ("할까요?", "haeyo"),
        ("물이 필요", None),
        ("추가 수요", None),
        ("물이 필요해요", "haeyo"),
        ("매우 중요.", None),
        ("바다", None),
        ("여름 바다.", None),
        ("먹었어.", "casual"),
        ("먹을래?", "casual"),
        ("좋네.", "casual"),
        ("가자!", "casual"),
        ("하지 마.", "casual"),
        ("뭐라고?", "casual"),
        ("한다.", "plain"),
        ("없다.", "plain"),
        ("책이다.", "plain"),
        ("Good.", None),
        ("좋아요 ^^", "haeyo"),
        ("좋아요ㅋㅋㅋ", "haeyo"),
        ("좋아 ㅎㅎ", "casual"),
    ],
)
def test_a_sentence_has_the_level_of_its_ending(sentence: str, level: str | None) -> None:
    assert level_of(sentence) == level


def test_headings_and_list_items_have_no_level() -> None:
    assert levels("# 언어\n1. 의자\n2. 바다\n\n모두 좋아요.") == ["haeyo"]


def test_sentences_end_where_a_reader_ends_them() -> None:
    assert sentences("1. 물은 3.5리터다. 2. 끓인다.") == ["물은 3.5리터다.", "2. 끓인다."]
    assert sentences("“어서 와.” 그가 말했다.") == ["“어서 와.”", "그가 말했다."]
    assert sentences("---\n***\n") == []
    assert sentences("Dr. 김은 vs. 표기를 쓴다. 끝") == ["Dr. 김은 vs. 표기를 쓴다.", "끝"]


def test_items_are_the_same_for_a_seed_and_name_every_kind() -> None:
    items = korean_items(380, seed=1)
    assert items == korean_items(380, seed=1)
    assert items[:100] == korean_items(100, seed=1)
    assert items[:10] != korean_items(10, seed=2)
    assert len({item.prompt for item in items}) == 380
    firsts = [item.instructions[0].kind for item in items]
    assert {firsts.count(kind) for kind in KOREAN} == {10}
    assert max(len(item.instructions) for item in items) == 3


def test_every_instruction_is_told_in_three_ways_with_what_it_asks_for() -> None:
    told: dict[str, set[str]] = {}
    for item in korean_items(3000, seed=3):
        first = item.instructions[0]
        told.setdefault(first.kind, set()).add(item.prompt)
        for instruction in item.instructions:
            for value in instruction.arguments.values():
                shown = value if isinstance(value, tuple) else (str(value),)
                assert value in ("at least", "at most", "exactly", True, False) or all(part in item.prompt for part in shown), item
    assert set(told) == set(KOREAN)


def test_particles_fit_the_words_before_them() -> None:
    prompts = " ".join(item.prompt for item in korean_items(1000, seed=4))
    assert re.findall(r"\S*(?:\(으\)|\(이\)|이\(가\)|을\(를\))\S*", prompts) == []
    assert "이하로" in prompts
    assert "이상으로" in prompts
    assert not re.search("이하으로|이상로|이하이어야|이상여야|'바나나'이 |'물'를 ", prompts)


def test_rules_of_an_answer_hold_for_its_decomposed_form() -> None:
    for kind, arguments, right, _ in CASES:
        if kind in (
            "form:one_of",
            "place:start_phrase",
            "words:required",
            "speech:polite",
            "script:hangul_only",
            "length:sentences",
        ):
            instructions = parse_instructions(KOREAN, [kind], [arguments], "row")
            assert all(verdicts(KOREAN, instructions, unicodedata.normalize("NFD", answer)).all_strict for answer in right), kind
