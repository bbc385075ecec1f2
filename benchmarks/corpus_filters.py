"""How many real Korean documents pass the Korean filters, and how much generated rubbish, with datatrove's defaults beside them.

    python benchmarks/corpus_filters.py SETS [--rubbish 800]

SETS holds directories `ko_*` of Markdown, gettext catalogues, text and JSON lines (field `content`). Counted are documents of
at least 200 characters whose letters outside markup are at least 60% Hangul. "Defaults" are datatrove's Gopher and FineWeb
filters as they come, with words between white space: its own word cutters need spaCy, or Kiwi, at 41,000 characters a second.
"""

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

from keural.data.cleaning.duplicates import CONFIG, Signatures
from keural.data.cleaning.filters import QualityFilter
from keural.data.cleaning.language import ScriptFilter
from keural.data.cleaning.measures import HANGUL, normalize, script_share, without_markup
from keural.data.cleaning.words import EOJEOL, PLAIN
from keural.data.records import Document as Text
from keural.data.sources import open_source
from keural.recipe import SourceSpec

ADAPTERS: dict[str, tuple[str, str | None, dict[str, str]]] = {
    ".md": ("markdown", None, {}),
    ".mdx": ("markdown", "markdown", {}),
    ".txt": ("text", None, {}),
    ".po": ("po", None, {}),
    ".jsonl": ("text", "jsonl", {"field": "content"}),
    ".json": ("text", "json", {"field": "review"}),
}
NAMES = ["서울", "강남", "홍대", "부산", "제주", "인천", "대구", "분당", "일산", "수원"]
GOODS = [
    "맛집",
    "호텔",
    "렌터카",
    "중고차",
    "대출",
    "다이어트",
    "성형외과",
    "이사",
    "꽃배달",
    "학원",
    "원룸",
    "보험",
    "카지노",
    "가방",
    "시계",
    "운동화",
]
MENU = ["홈", "로그인", "회원가입", "장바구니", "주문조회", "고객센터", "마이페이지", "이용약관",
        "개인정보처리방침", "사이트맵", "검색", "더보기", "이전글",
        "다음글", "목록", "공지사항", "이벤트", "베스트", "신상품", "쿠폰존", "전체보기",
        "구독하기", "공유하기", "인쇄", "글자크기"]  # fmt: skip
SUBJECTS = ["아이들이", "할머니는", "회사는", "정부가", "우리 팀이", "그 작가는", "연구자들은", "손님이"]
OBJECTS = ["오래된 지도를", "새로운 계획을", "작은 정원을", "어려운 문제를", "따뜻한 밥을", "긴 편지를"]
VERBS = ["천천히 살펴보았다.", "다시 고치기로 했다.", "이웃에게 보여 주었다.", "끝까지 지켜보고 있었다.", "봄이 오기 전에 마쳤다."]


def sentences(generator: random.Random, count: int) -> str:
    """Plain Korean sentences."""
    return " ".join(f"{generator.choice(SUBJECTS)} {generator.choice(OBJECTS)} {generator.choice(VERBS)}" for _ in range(count))


def mojibake(generator: random.Random) -> str:
    """Sentences whose bytes were decoded with a wrong encoding."""
    text = sentences(generator, generator.randint(8, 20))
    written, read = generator.choice([("utf-8", "latin-1"), ("utf-8", "cp949"), ("cp949", "latin-1"), ("cp949", "utf-8")])
    return text.encode(written).decode(read, "replace")


def keyword_spam(generator: random.Random) -> str:
    """Search words in a row."""
    separator = generator.choice([" ", ", ", " / ", "\n", " #", ". ", "!\n"])
    return separator.join(
        generator.choice(NAMES) + generator.choice(["", " "]) + generator.choice(GOODS) for _ in range(generator.randint(60, 200))
    )


def repeated_lines(generator: random.Random) -> str:
    """A few lines again and again."""
    lines = [sentences(generator, 1) for _ in range(generator.randint(1, 4))]
    return "\n".join(generator.choice(lines) for _ in range(generator.randint(15, 60)))


def navigation(generator: random.Random) -> str:
    """The menus of a page."""
    separator = generator.choice([" | ", "\n", " > ", "  ", "\n- ", ".\n", ". "])
    return separator.join(generator.choice(MENU) for _ in range(generator.randint(60, 160)))


RUBBISH: dict[str, Callable[[random.Random], str]] = {
    "mojibake": mojibake, "keyword spam": keyword_spam, "repeated lines": repeated_lines, "navigation": navigation,
}  # fmt: skip


def real_documents(sets: Path) -> Iterator[tuple[str, str]]:
    """Name of the set and text of every document that counts."""
    for path in sorted(path for path in sets.glob("ko_*/**/*") if path.is_file() and path.name != "SOURCE"):
        kind = path.suffix or ".jsonl"
        if kind not in ADAPTERS:
            continue
        adapter, form, options = ADAPTERS[kind]
        name = path.relative_to(sets).parts[0]
        spec = SourceSpec(name=name, adapter=adapter, path=str(path), format=form, options=options, language="ko")
        for record in open_source(spec, None).read(seed=0):
            if isinstance(record, Text) and len(record.text) >= 200 and script_share(without_markup(record.text), HANGUL) >= 0.6:
                yield name, record.text


class Ours:
    """Language by script, then the Korean filters."""

    def __init__(self) -> None:
        self._filters = [ScriptFilter(), QualityFilter()]

    def __call__(self, text: str) -> str:
        """The reason to drop a text, or `kept`."""
        return first_reason(Document(text=normalize(text), id="", metadata={"kind": "ko"}), self._filters)


class Defaults:
    """datatrove's defaults."""

    def __init__(self) -> None:
        self._filters = [
            GopherRepetitionFilter(language=PLAIN),
            FineWebQualityFilter(language=PLAIN),
            GopherQualityFilter(language=PLAIN),
        ]

    def __call__(self, text: str) -> str:
        """The reason to drop a text, or `kept`."""
        return first_reason(Document(text=text, id=""), self._filters)


def first_reason(document: Document, filters: list) -> str:
    """Of the first filter that drops the document."""
    for each in filters:
        result = each.filter(document)
        if result is not True:
            return str(result[1] if isinstance(result, tuple) else each.name)
    return "kept"


def near_duplicates(pairs: int = 600) -> None:
    """Print how often MinHash joins pairs of texts, by the exact Jaccard similarity of their 5-grams, and what is expected."""
    step = Signatures("signatures", config=CONFIG, language=EOJEOL)
    generator = random.Random(7)
    found: list[tuple[float, bool]] = []
    for _ in range(pairs):
        words = sentences(generator, 40).split(" ")
        changed = list(words)
        for _ in range(generator.choice([0, 1, 2, 3, 4, 6, 8, 12, 16])):
            changed[generator.randrange(len(changed))] = f"낱말{generator.randrange(10**6)}"
        shingles = [step.get_shingles(" ".join(each)) for each in (words, changed)]
        one, other = (set(each.ravel().tolist()) for each in shingles)
        buckets = zip(*map(step.get_signature, shingles), strict=True)
        found.append((len(one & other) / len(one | other), any(first == second for first, second in buckets)))
    print("\n| similarity | pairs | joined | expected |\n|---|---|---|---|")
    for low, high in ((0.0, 0.3), (0.3, 0.5), (0.5, 0.65), (0.65, 0.8), (0.8, 0.9), (0.9, 1.01)):
        inside = [(similarity, joined) for similarity, joined in found if low <= similarity < high]
        if inside:
            joined = sum(joined for _, joined in inside) / len(inside)
            expected = sum(1 - (1 - similarity**8) ** 14 for similarity, _ in inside) / len(inside)
            print(f"| {low:.2f}-{min(high, 1):.2f} | {len(inside)} | {joined:.3f} | {expected:.3f} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", type=Path)
    parser.add_argument("--rubbish", type=int, default=800)
    options = parser.parse_args()
    documents = list(real_documents(options.sets))
    generator = random.Random(0)
    rubbish = [(kind, make(generator)) for kind, make in RUBBISH.items() for _ in range(options.rubbish // len(RUBBISH))]
    for judge in (Ours(), Defaults()):
        started = time.perf_counter()
        verdicts = [(name, judge(text)) for name, text in documents]
        rate = sum(len(text) for _, text in documents) / (time.perf_counter() - started)
        kept = sum(verdict == "kept" for _, verdict in verdicts)
        reasons = Counter(verdict for _, verdict in verdicts if verdict != "kept")
        print(
            f"\n{type(judge).__name__}: {kept:,} of {len(documents):,} documents kept ({kept / len(documents):.1%}), "
            f"{rate / 1e6:.2f} M characters/s"
        )
        print("dropped: " + (", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "none"))
        print("\n| set | documents | kept |\n|---|---|---|")
        for name in sorted({name for name, _ in documents}):
            those = [verdict for other, verdict in verdicts if other == name]
            print(f"| {name} | {len(those):,} | {sum(verdict == 'kept' for verdict in those) / len(those):.1%} |")
        print("\n| rubbish | items | dropped | why |\n|---|---|---|---|")
        judged = [(kind, judge(text)) for kind, text in rubbish]
        for kind in [*RUBBISH, "all"]:
            those = [verdict for other, verdict in judged if kind in (other, "all")]
            why = ", ".join(f"{reason} {count}" for reason, count in Counter(those).most_common(4) if reason != "kept")
            print(f"| {kind} | {len(those)} | {sum(verdict != 'kept' for verdict in those) / len(those):.1%} | {why} |")
    near_duplicates()


if __name__ == "__main__":
    main()
