"""What exists in the micro-world: sums, clauses, profiles and small talk, and which of them are held out.

Content is language-free: a sum is a pair of numbers, a clause is who does what to what, a profile is who lives where and likes
what; only small talk is what is said, word for word. Each has a key, and a hash of the key alone decides whether it is held out. So
one piece of content is on the same side in both languages, in every phrasing, notation, tense and register, in prose, chats and
preference pairs, and for every seed. Sums up to twenty, and of numbers up to twelve, are learnt by heart, as at school: of these
no sum is held out, but questions are, word for word.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

Split = Literal["train", "heldout"]
SMALL_BELOW = 20
"""Numbers below this one are added where the total is not above it, larger ones where nothing carries."""
TABLE_UP_TO = 12
"""Numbers up to this one are added whatever the total is."""
HELD_OUT_PER_MILLE = 150
TALK_HELD_OUT_PER_MILLE = 300
"""Of small talk, of which there is little."""


@dataclass(frozen=True, slots=True, order=True)
class Sum:
    """`first` + `second`: two numbers below twenty whose total is at most that, two up to twelve, or two of 20 to 79 whose digits
    add up without a carry; `first` is not the larger one.
    """

    first: int
    second: int

    @property
    def total(self) -> int:
        """At most 99."""
        return self.first + self.second

    @property
    def is_small(self) -> bool:
        """Whether both numbers are below twenty; such sums are learnt by heart."""
        return self.second < SMALL_BELOW

    @property
    def carries(self) -> bool:
        """Whether the ones add up to ten or more."""
        return self.first % 10 + self.second % 10 > 9

    @property
    def key(self) -> str:
        """The unordered pair."""
        return f"sum {self.first} {self.second}"


@dataclass(frozen=True, slots=True)
class Noun:
    """A thing in both languages; `counted` says whether English gives it an article."""

    english: str
    korean: str
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Verb:
    """An action: English base, third person and past; Korean stem, plain present, 해-form, past stem; and its possible objects."""

    english: str
    present: str
    past: str
    stem: str
    plain: str
    informal: str
    past_stem: str
    objects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Clause:
    """Who (`subject`) does what (`verb`) to what (`object`)."""

    subject: Noun
    verb: Verb
    object: Noun

    @property
    def key(self) -> str:
        """The three words; tense and polarity are not part of it."""
        return f"clause {self.subject.english} {self.verb.english} {self.object.english}"


@dataclass(frozen=True, slots=True)
class Profile:
    """`person` lives in `place` and likes `thing`; all are (English, Korean)."""

    person: tuple[str, str]
    place: tuple[str, str]
    thing: tuple[str, str]

    @property
    def key(self) -> str:
        """The three words."""
        return f"profile {self.person[0]} {self.place[0]} {self.thing[0]}"


@dataclass(frozen=True, slots=True)
class Talk:
    """What somebody says who asks for nothing, word for word: of a kind (a greeting), in Korean in a register."""

    language: str
    kind: str
    text: str
    polite: bool
    is_plain: bool
    """Whether nothing stands before or after what is said: what people type first, which is learnt by heart."""

    @property
    def key(self) -> str:
        """The words, small letters or not: what differs in these alone lies on the same side."""
        return f"talk {self.text.lower()}"


@dataclass(frozen=True, slots=True)
class Question:
    """A question about what is learnt by heart, word for word."""

    text: str

    @property
    def key(self) -> str:
        """The words, without what is left out in haste: capitals and the mark at the end."""
        return f"question {self.text.lower().rstrip('?.= ')}"


Content = Sum | Clause | Profile | Talk | Question
ContentT = TypeVar("ContentT", Sum, Clause, Profile, Talk, Question)

SUBJECTS = tuple(
    Noun(english, korean)
    for english, korean in [
        ("student", "학생"),
        ("doctor", "의사"),
        ("farmer", "농부"),
        ("cook", "요리사"),
        ("painter", "화가"),
        ("singer", "가수"),
        ("boy", "소년"),
        ("girl", "소녀"),
        ("prince", "왕자"),
        ("writer", "작가"),
        ("soldier", "군인"),
        ("nurse", "간호사"),
    ]
)
OBJECTS = {
    noun.english: noun
    for noun in [
        Noun("apple", "사과"),
        Noun("bread", "빵", counted=False),
        Noun("cake", "케이크"),
        Noun("orange", "오렌지"),
        Noun("egg", "달걀"),
        Noun("milk", "우유", counted=False),
        Noun("water", "물", counted=False),
        Noun("coffee", "커피", counted=False),
        Noun("juice", "주스", counted=False),
        Noun("tea", "차", counted=False),
        Noun("book", "책"),
        Noun("letter", "편지"),
        Noun("newspaper", "신문"),
        Noun("poem", "시"),
        Noun("flower", "꽃"),
        Noun("tree", "나무"),
        Noun("house", "집"),
        Noun("bird", "새"),
        Noun("cup", "컵"),
        Noun("bowl", "그릇"),
        Noun("shirt", "셔츠"),
        Noun("hat", "모자"),
        Noun("umbrella", "우산"),
        Noun("map", "지도"),
    ]
}
VERBS = (
    Verb("eat", "eats", "ate", "먹", "먹는다", "먹어", "먹었", ("apple", "bread", "cake", "orange", "egg")),
    Verb("drink", "drinks", "drank", "마시", "마신다", "마셔", "마셨", ("milk", "water", "coffee", "juice", "tea")),
    Verb("read", "reads", "read", "읽", "읽는다", "읽어", "읽었", ("book", "letter", "newspaper", "poem", "map")),
    Verb("draw", "draws", "drew", "그리", "그린다", "그려", "그렸", ("flower", "tree", "house", "bird", "map")),
    Verb("wash", "washes", "washed", "씻", "씻는다", "씻어", "씻었", ("apple", "orange", "cup", "bowl", "egg")),
    Verb("find", "finds", "found", "찾", "찾는다", "찾아", "찾았", ("book", "letter", "hat", "umbrella", "bird")),
    Verb("sell", "sells", "sold", "팔", "판다", "팔아", "팔았", ("flower", "bread", "hat", "umbrella", "shirt")),
    Verb("make", "makes", "made", "만들", "만든다", "만들어", "만들었", ("cake", "juice", "tea", "shirt", "bowl")),
)
PEOPLE = (
    ("Minsu", "민수"),
    ("Jia", "지아"),
    ("Seojun", "서준"),
    ("Yuna", "유나"),
    ("Doyun", "도윤"),
    ("Junho", "준호"),
    ("Sujin", "수진"),
    ("Hyunwoo", "현우"),
    ("Eunji", "은지"),
    ("Taemin", "태민"),
    ("Sora", "소라"),
    ("Jihun", "지훈"),
    ("Mina", "미나"),
    ("Kyungho", "경호"),
    ("Bora", "보라"),
    ("Woojin", "우진"),
)
PLACES = (
    ("Seoul", "서울"),
    ("Busan", "부산"),
    ("Daegu", "대구"),
    ("Incheon", "인천"),
    ("Gwangju", "광주"),
    ("Daejeon", "대전"),
    ("Ulsan", "울산"),
    ("Suwon", "수원"),
    ("Jeonju", "전주"),
    ("Gangneung", "강릉"),
    ("Yeosu", "여수"),
    ("Jeju", "제주"),
)
THINGS = (
    ("soccer", "축구"),
    ("music", "음악"),
    ("movies", "영화"),
    ("dancing", "춤"),
    ("math", "수학"),
    ("history", "역사"),
    ("cats", "고양이"),
    ("dogs", "강아지"),
    ("rain", "비"),
    ("snow", "눈"),
    ("mountains", "산"),
    ("the sea", "바다"),
)


def is_held_out(content: Content) -> bool:
    """Whether this content is kept from every training stage; what is learnt by heart never is."""
    if (isinstance(content, Sum) and content.is_small) or (isinstance(content, Talk) and content.is_plain):
        return False
    digest = hashlib.blake2b(content.key.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % 1000 < (TALK_HELD_OUT_PER_MILLE if isinstance(content, Talk) else HELD_OUT_PER_MILLE)


def of_split(contents: list[ContentT], split: Split) -> tuple[ContentT, ...]:
    """Those of a split."""
    return tuple(content for content in contents if is_held_out(content) == (split == "heldout"))


@cache
def sums(split: Split) -> tuple[Sum, ...]:
    """All sums of a split: those up to twenty and of numbers up to twelve, and those of numbers from twenty on without a carry."""
    small, large = (
        [Sum(a, b) for a in numbers for b in numbers if a <= b] for numbers in (range(1, SMALL_BELOW), range(SMALL_BELOW, 80))
    )
    small = [pair for pair in small if pair.total <= SMALL_BELOW or pair.second <= TABLE_UP_TO]
    return of_split([*small, *(pair for pair in large if pair.total <= 99 and not pair.carries)], split)


@cache
def clauses(split: Split) -> tuple[Clause, ...]:
    """All clauses of a split."""
    return of_split([Clause(who, verb, OBJECTS[what]) for who in SUBJECTS for verb in VERBS for what in verb.objects], split)


@cache
def profiles(split: Split) -> tuple[Profile, ...]:
    """All profiles of a split."""
    return of_split([Profile(who, where, what) for who in PEOPLE for where in PLACES for what in THINGS], split)
