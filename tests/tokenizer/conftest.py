"""Tokenizers and texts that this room's tests share."""

import gzip
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from keural.recipe import SourceSpec, TokenizerSpec
from keural.tokenizer import KeuralTokenizer, train_tokenizer

HANGUL = "고양이강아지바다산책노래상창문침저녁친구학교도서관기차여행커피사과를은에서합니다했어요"
SYLLABLES = ["ka", "lo", "mi", "ten", "ru", "sha", "bri", "no", "ve", "qui", "ing", "ed"]


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., TokenizerSpec]:
    """Makes a TokenizerSpec that trains, from its other settings."""
    return lambda **settings: TokenizerSpec(sources=[SourceSpec(name="texts", adapter="text")], **settings)


@pytest.fixture(scope="session")
def bilingual_texts() -> list[str]:
    """A few hundred short documents of made-up Korean, English and code."""
    rng = random.Random(7)
    korean = ["".join(rng.choices(HANGUL, k=rng.randint(1, 4))) for _ in range(400)]
    english = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(400)]
    texts = []
    for _ in range(400):
        name, number = "_".join(rng.sample(english, 2)), rng.randrange(999)
        code = f"def {name}(x):\n    if x < {number}:\n        return x + 1\n\treturn {{}}  # 주석 <|>\n\n\n"
        texts.append(f"{' '.join(rng.sample(korean, 9))}.\n{' '.join(rng.sample(english, 12)).capitalize()}!\n\n{code}")
    return texts


@pytest.fixture(scope="session")
def lossless(
    bilingual_texts: list[str], make_spec: Callable[..., TokenizerSpec], tmp_path_factory: pytest.TempPathFactory
) -> KeuralTokenizer:
    """A small lossless tokenizer."""
    return train_tokenizer(bilingual_texts, make_spec(vocab_size=640), tmp_path_factory.mktemp("lossless") / "tokenizer", seed=0)


@pytest.fixture(scope="session")
def published(published_tokenizer_file: Path) -> KeuralTokenizer:
    """The published tokenizer."""
    return KeuralTokenizer.load(published_tokenizer_file)


@pytest.fixture(params=["lossless", "published"])
def either(request: pytest.FixtureRequest) -> KeuralTokenizer:
    """Each kind of tokenizer in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def as_json(tmp_path_factory: pytest.TempPathFactory) -> Callable[[KeuralTokenizer], Tokenizer]:
    """Gives the converted tokenizer.json of a tokenizer, loaded, with names of special tokens in text left as text."""

    def convert(tokenizer: KeuralTokenizer) -> Tokenizer:
        directory = tmp_path_factory.mktemp("converted")
        tokenizer.save(directory)
        converted = Tokenizer.from_file(str(directory / "tokenizer.json"))
        converted.encode_special_tokens = True
        return converted

    return convert


@pytest.fixture(scope="session")
def corpus(real_data: Path) -> dict[str, list[str]]:
    """All lines of the real data by set, compressed members included."""
    lines: dict[str, list[str]] = {}
    for file in sorted(path for path in real_data.rglob("*") if path.is_file()):
        name = file.relative_to(real_data).parts[0]
        for content in _contents(file):
            lines.setdefault(name, []).extend(content.decode("utf-8").split("\n"))
    return lines


def _contents(file: Path) -> list[bytes]:
    if file.name.endswith(".tar.gz"):
        with tarfile.open(file) as archive:
            members = [archive.extractfile(member) for member in archive if member.isfile()]
            return [member.read() for member in members if member is not None]
    return [gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()]


@pytest.fixture(scope="session")
def corpus_sample(corpus: dict[str, list[str]]) -> list[str]:
    """Up to 200 lines, evenly spread, of every Korean, English and parallel set."""
    sample = []
    for name, lines in corpus.items():
        if name.startswith(("ko_", "en_", "par_")):
            sample += lines[:: max(1, len(lines) // 200)]
    return sample


@pytest.fixture(scope="session")
def real_lossless(
    corpus_sample: list[str], make_spec: Callable[..., TokenizerSpec], tmp_path_factory: pytest.TempPathFactory
) -> KeuralTokenizer:
    """A lossless tokenizer trained on the sample of the real data."""
    spec = make_spec(vocab_size=3000, max_bytes=1_000_000)
    return train_tokenizer(corpus_sample, spec, tmp_path_factory.mktemp("real_lossless") / "tokenizer", seed=0)
