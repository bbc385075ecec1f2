"""An encoding is taken because the text looks like a language in it, never because nothing failed; else it is refused or given."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keural.data.readers.encodings import guess_encoding
from keural.data.readers.sniff import describe
from keural.data.records import Document, Drop
from keural.data.sources import open_source
from keural.errors import UserError
from keural.recipe import SourceSpec
from tests.helpers.examples import examples

SENTENCES = {
    "Korean": [
        "안녕하세요, 오늘은 바람이 많이 부네요.",
        "이 문장을 영어로 옮겨 주시겠어요?",
        "버스로 가면 사십 분쯤 걸립니다.",
        "값을 돌려주기 전에 먼저 확인하십시오.",
        "할아버지께서 감자를 구워 주셨다.",
        "네, 알겠습니다!",
    ],
    "English": [
        "It’s the farmer’s book, and we don’t know why.",
        "She said “hello” and left — quickly.",
        "What’s next? Prices rose by £20…",
        "Don’t open the door.",
    ],
    "French": ["L’été dernier, nous avons visité une forêt près d’ici.", "Ça va très bien, merci.", "Elle a été créée à Paris."],
    "German": ["Die Straße ist schön und ruhig.", "Über den Fluss führt eine Brücke.", "Ich möchte ein Stück Käse."],
    "Spanish": ["El niño comió una manzana.", "La situación cambió después.", "Mañana iremos a la montaña."],
    "Chinese": ["今天的天气很好，我们去公园散步吧。", "请把这句话翻译成英文。", "他昨天在图书馆借了三本书。"],
    "traditional Chinese": ["今天的天氣很好，我們去公園散步吧。", "請把這句話翻譯成英文。", "這是一個簡單的問題。"],
    "Japanese": ["今日は天気がとても良いですね。", "この文を英語に翻訳してください。", "水は百度で沸騰します。"],
    "Russian": ["Сегодня очень хорошая погода.", "Переведите это предложение.", "Вода кипит при ста градусах."],
    "Polish": ["Dzisiaj jest bardzo ładna pogoda, więc pójdziemy na spacer.", "Książka leży na półce."],
    "Turkish": ["Bugün hava çok güzel, şehirde yürüyüş yaptık.", "Öğrenci kitabı okuyor."],
    "Greek": ["Σήμερα ο καιρός είναι πολύ καλός.", "Πού είναι η βιβλιοθήκη;"],
}
KNOWN = [
    *(
        ("Korean", name)
        for name in ("utf-8", "cp949", "euc-kr", "johab", "iso2022_kr", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
    ),
    *((language, "cp1252") for language in ("English", "French", "German", "Spanish")),
    *(("French", name) for name in ("latin-1", "iso8859-15", "utf-16-be")),
    *(("Chinese", name) for name in ("gb18030", "gbk", "gb2312", "utf-16-le")),
    ("traditional Chinese", "big5"),
    *(("Japanese", name) for name in ("shift_jis", "euc_jp", "iso2022_jp")),
    *(("Russian", name) for name in ("cp1251", "koi8_r")),
    ("Polish", "cp1250"),
    ("Turkish", "cp1254"),
    ("Greek", "cp1253"),
]
UNKNOWN = [("German", "mac_roman"), ("French", "cp850"), ("Russian", "iso8859_5"), ("Russian", "cp866")]


def encoded(text: str, encoding: str) -> tuple[bytes, str]:
    """The text in an encoding, without what that lacks."""
    raw = text.encode(encoding, "ignore")
    return raw, raw.decode(encoding)


@pytest.mark.parametrize(("language", "encoding"), KNOWN)
@pytest.mark.parametrize("lines", [6, 60])
def test_text_of_some_lines_is_read_as_it_was_written(language: str, encoding: str, lines: int) -> None:
    chosen = random.Random(f"{language} {encoding} {lines}")
    raw, text = encoded("".join(f"{chosen.choice(SENTENCES[language])}\n" for _ in range(lines)), encoding)
    found = guess_encoding(raw, complete=True)
    assert found.encoding is not None, found.evidence
    assert raw.decode(found.encoding) == text


@pytest.mark.parametrize(("language", "encoding"), [*KNOWN, *UNKNOWN])
def test_a_single_sentence_is_read_as_it_was_written_or_not_at_all(language: str, encoding: str) -> None:
    for sentence in SENTENCES[language]:
        raw, text = encoded(f"{sentence}\n", encoding)
        found = guess_encoding(raw, complete=True).encoding
        assert found is None or raw.decode(found) == text, (found, sentence)


@pytest.mark.parametrize(("language", "encoding"), UNKNOWN)
def test_an_encoding_that_is_not_tried_is_not_taken_for_another(language: str, encoding: str) -> None:
    raw, _ = encoded("\n".join(SENTENCES[language] * 4), encoding)
    assert guess_encoding(raw, complete=True).encoding is None


@given(st.lists(st.sampled_from(SENTENCES["Korean"]), min_size=2, max_size=12), st.data())
@examples(15)
def test_english_words_between_korean_ones_change_nothing(sentences: list[str], data: st.DataObject) -> None:
    words = data.draw(st.lists(st.sampled_from(["API", "It is fine.", "2026", "x = 1"]), max_size=6))
    raw = "\n".join([*sentences, *words]).encode("cp949")
    assert guess_encoding(raw, complete=True).encoding == "cp949"


@given(st.binary(min_size=100, max_size=2000).filter(lambda raw: sum(byte >= 0x80 for byte in raw) > len(raw) // 3))
@examples(40)
def test_random_bytes_are_no_text(raw: bytes) -> None:
    assume_no_mark = raw[:4] not in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") and raw[:2] not in (b"\xff\xfe", b"\xfe\xff")
    assert not assume_no_mark or guess_encoding(raw, complete=True).encoding is None


def read(data_dir: Path, name: str, content: bytes, **options: Any) -> list[Any]:
    (data_dir / name).write_bytes(content)
    spec = SourceSpec(name="s", adapter="text", path=name, options=options)
    return list(open_source(spec, data_dir).read(seed=0))


def test_apostrophes_alone_make_no_hangul(data_dir: Path) -> None:
    lines = [f"It’s the farmer’s book number {number}, and we don’t know whether he’ll read it." for number in range(20)]
    found = read(data_dir, "book.txt", "\n".join(lines).encode("cp1252"), split="line")
    assert [record.text for record in found] == lines
    assert describe(data_dir / "book.txt").assumed == ("read as cp1252 (read so it looks like a language of western Europe)",)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("text", ["The cat sees a red house.\n" * 20, "고양이가 집을 봅니다.\n" * 20, '{"a": "나무"}\n'])
def test_wide_characters_with_and_without_a_mark(data_dir: Path, encoding: str, text: str) -> None:
    assert read(data_dir, "a.txt", text.encode(encoding)) == [Document(text, "a.txt")]


def test_some_bytes_that_are_not_utf_8_cost_their_rows_and_are_named(data_dir: Path) -> None:
    text = "".join(f"문서 {number}번입니다.\n" for number in range(30)).encode()
    found = read(data_dir, "a.txt", text + b"It\x92s\n" + text, split="line")
    drops = [record for record in found if isinstance(record, Drop)]
    assert drops == [Drop("invalid_unicode", "a.txt:31", f"the bytes 92 at offset {len(text) + 2:,} are not utf-8")]


def test_utf_8_and_another_encoding_in_one_file_are_not_read_as_either() -> None:
    raw = "It’s here. It’s there. ".encode() + "It’s gone, and that’s it. She’s back.".encode("cp1252")
    assert guess_encoding(raw, complete=True).encoding is None


def test_what_stands_far_into_an_ascii_file_is_seen(data_dir: Path) -> None:
    korean = "".join(f"{number}: 바람이 많이 부는 날입니다.\n" for number in range(40_000)).encode("cp949")
    (data_dir / "a.txt").write_bytes(b"plain line\n" * 40_000 + korean)
    assert describe(data_dir / "a.txt").encoding == "cp949"


def test_undecided_is_refused_with_the_option_and_the_option_helps(data_dir: Path) -> None:
    raw = "뷁쀍".encode("cp949")
    with pytest.raises(UserError) as refused:
        read(data_dir, "a.txt", raw)
    assert str(refused.value).startswith(f"source 's': {data_dir}/a.txt: it is not clear how it is encoded: ")
    assert "options: {encoding: NAME}" in str(refused.value)
    assert read(data_dir, "a.txt", raw, encoding="cp949") == [Document("뷁쀍", "a.txt")]


@pytest.mark.parametrize("name", ["utf9", "rot13", "hex", "undefined", "", "cp949\0", "../x", "idna"])
def test_an_encoding_that_is_none_is_refused(data_dir: Path, name: str) -> None:
    with pytest.raises(UserError, match="unknown encoding"):
        read(data_dir, "a.txt", b"a", encoding=name)


@pytest.mark.parametrize("option", ["encoding", "delimiter", "quote"])
@pytest.mark.parametrize("value", [5, True, ["cp949"], {}])
def test_an_option_of_another_type_is_refused(data_dir: Path, option: str, value: Any) -> None:
    (data_dir / "a.csv").write_text("text,n\nx,1\n")
    spec = SourceSpec(name="s", adapter="text", path="a.csv", options={option: value})
    with pytest.raises(UserError, match=f"option '{option}' must be a text, got"):
        open_source(spec, data_dir)


def test_a_wrong_encoding_names_the_bytes(data_dir: Path) -> None:
    (drop,) = read(data_dir, "a.txt", b"plain " * 5000 + "바람".encode(), encoding="ascii")
    assert drop.reason == "invalid_unicode"
    assert drop.detail == "the bytes eb at offset 30,000 are not ascii"


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress)])
def test_a_given_encoding_reads_every_format(data_dir: Path, suffix: str, pack: Any) -> None:
    text = json.dumps({"text": "가격은 1,000원"}, ensure_ascii=False)
    for name, content in (
        ("a.jsonl", text),
        ("a.json", text),
        ("a.csv", 'text\n"가격은 1,000원"\n'),
        ("a.yaml", "text: 가격은 1,000원"),
    ):
        for encoding in ("cp949", "utf-16-le", "utf-8"):
            (record,) = read(data_dir, name + suffix, pack(content.encode(encoding)), encoding=encoding)
            assert record.text == "가격은 1,000원"


def test_a_given_encoding_that_the_text_contradicts_is_said(data_dir: Path) -> None:
    (data_dir / "a.txt").write_text("바람이 많이 부는 날이다.")
    spec = SourceSpec(name="s", adapter="text", path="a.txt", options={"encoding": "cp1254"})
    ((file, _),) = open_source(spec, data_dir).files
    assert file.shape is not None
    assert file.shape.assumed == ("read as cp1254, as the recipe says, though it looks like utf-8 (it is valid UTF-8)",)
    (data_dir / "a.txt").write_bytes("바람이 많이 부는 날이다.".encode("cp949"))
    for name in ("cp949", "euc-kr"):
        ((file, _),) = open_source(spec.model_copy(update={"options": {"encoding": name}}), data_dir).files
        assert file.shape is not None
        assert file.shape.assumed == ()
