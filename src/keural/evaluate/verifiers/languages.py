"""The language of an answer: by its script where that says it, by letters and common words where several languages share one.

In: a text. Out: an ISO 639-1 code. A rule of our own with no library and no chance: IFEval itself asks `langdetect`, which draws
random numbers and errs on short or mixed texts in its own way. Both agree on ordinary paragraphs in the languages below.
"""

import re
import unicodedata
from collections import Counter

_SCRIPTS = {
    "HANGUL": "ko",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "CJK": "zh",
    "KANNADA": "kn",
    "GURMUKHI": "pa",
    "GUJARATI": "gu",
    "TELUGU": "te",
    "TAMIL": "ta",
    "THAI": "th",
    "BENGALI": "bn",
    "MALAYALAM": "ml",
    "GREEK": "el",
    "HEBREW": "he",
    "LATIN": "",
    "CYRILLIC": "",
    "ARABIC": "",
    "DEVANAGARI": "",
}
"""Scripts by the first word of their letters' Unicode names, with the language of those that only one has here."""

_LETTERS = {
    "ARABIC": (("ur", "ٹڈڑںےھہ"), ("fa", "پچژگکی")),
    "CYRILLIC": (("uk", "іїєґ"), ("ru", "ыэё")),
    "LATIN": (("vi", "ăơưđạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ"), ("tr", "ğışİ"), ("pl", "ąęłńśźż")),
}
"""Letters that tell languages of one script apart, the surest first: several of them decide."""

_WORDS = {
    "LATIN": {
        "en": "the and of to in is that it for was with as on are this be you not have by we will they an or from at your can i my",
        "de": "der die das und ist nicht ein eine ich zu mit den auf für es sich dem im von wir sie auch als sind werden wie haben",
        "fr": "le la les des et est une un que pour dans qui pas sur au avec il nous vous ce plus sont par je ne aux cette",
        "es": "el la los las de y que en un una es por con para del se no su al como más pero muy está esta son yo",
        "pt": "o a os as de e que em um uma é por com para do da no na se não ao como mais mas muito está são você eu foi",
        "it": "il lo la gli le di e che in un una è per con non si del della dei al come più ma sono anche nel questo io",
        "nl": "de het een en van is dat niet op te zijn voor met die aan er ook maar bij wij ik om als hebben wordt naar",
        "fi": "ja on ei se että hän oli mutta kun olla niin kuin myös ovat tai joka minä sen mitä voi tämä jos ole sinä",
        "sv": "och att det som en på är av för den med till inte har de ett om vi jag men var kan sig från du",
        "sw": "na ya wa kwa ni katika la za kuwa hii hiyo yake cha watu sana lakini kama si au pia mimi wewe yeye kila moja",
        "vi": "là và của có không được một cho các những trong người này với để khi đã tôi bạn rất",
        "tr": "ve bir bu için ile çok da de ne var ben sen olarak daha gibi kadar ama değil mi",
        "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya adalah ke bisa kami anda",
        "pl": "i w nie na się z do to że jest jak ale o co po tak za dla od ich był są",
    },
    "DEVANAGARI": {
        "hi": "है हैं का की के को में से और यह वह था थी थे एक पर ने नहीं हो भी तो कि जो हम मैं अपने लिए",
        "mr": "आहे आहेत आणि या ला मध्ये होते होता होती हे ही तो ते नाही मी आम्ही तुम्ही च्या साठी पण असे एक करणे",
        "ne": "छ छन् र को मा लाई हो यो त्यो थियो गर्न भएको गरेको हामी म तपाईं पनि छैन हुन्छ एक गर्ने देखि",
    },
    "CYRILLIC": {
        "ru": "и в не на что я с он как это по но они мы за то все так его только было для мне к у из бы вы от",
        "bg": "и на да е се в за с не от той това като по са но или аз ние ще си има до ли които във със",
        "uk": "і в не на що я з він як це по але вони ми за то все так його тільки було для у та від",
    },
    "ARABIC": {
        "ar": "في من على إلى أن هذا هذه التي الذي كان و لا مع عن ما هو هي كل بين أو قد",
        "fa": "در از به که این را با است برای آن و یک می ها شود کرد شد بود",
        "ur": "ہے ہیں کا کی کے میں سے اور یہ وہ کو نے پر تھا ایک نہیں بھی اس ہو لیے",
    },
}
"""Words that stand in almost every paragraph of a language."""
_DEFAULT = {"LATIN": "en", "DEVANAGARI": "hi", "CYRILLIC": "ru", "ARABIC": "ar"}
"""Where no word decides."""
_SURE = 0.02
"""Share of a language's own letters from which they decide alone."""
_WORD_SETS = {script: {code: frozenset(words.split()) for code, words in table.items()} for script, table in _WORDS.items()}


def language_of(text: str) -> str | None:
    """The language that most letters of a text are in; None for a text without letters."""
    letters = Counter(_script(letter) for letter in text if letter.isalpha())
    letters.pop("", None)
    if not letters:
        return None
    if letters["HIRAGANA"] + letters["KATAKANA"] >= 0.1 * letters.total():
        return "ja"
    script = max(letters, key=lambda name: letters[name])
    return _SCRIPTS[script] or _among(script, text.lower(), letters[script])


def _script(letter: str) -> str:
    """The script of a letter; empty for one that is not known here."""
    if letter.isascii():
        return "LATIN"
    name = unicodedata.name(letter, "").split(" ")[0]
    return name if name in _SCRIPTS else ""


def _among(script: str, text: str, letters: int) -> str:
    """Which of the languages of one script a text is in."""
    for code, own in _LETTERS.get(script, ()):
        if sum(text.count(letter) for letter in own) >= max(2, _SURE * letters):
            return code
    words = Counter(re.findall(r"[^\W\d_]+(?:[\u0900-\u0dff\u200c\u200d]+[^\W\d_]*)*", text))
    found = {code: sum(words[word] for word in known) for code, known in _WORD_SETS[script].items()}
    best = max(found, key=lambda code: (found[code], code == _DEFAULT[script]))
    return best if found[best] else _DEFAULT[script]
