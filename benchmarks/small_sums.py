"""Every sum that the toy learns by heart, and what a person types first, asked of a trained toy.

    python benchmarks/small_sums.py runs/toy [--wrong 20]

In: a run or model directory of `keural run toy`. Out: for each of six plain ways to ask, how many of the 200 sums (both orders: up
to twenty, and of numbers up to twelve) get the right answer, greedy, and the first wrong ones; then the first questions with their
answers as they come. All of these sums occur in training, and most of these questions do, word for word: this measures what is
known by heart.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from keural.evaluate.generation import greedy
from keural.microworld import english, korean
from keural.pretrained.stored_model import load_model, load_tokenizer
from keural.tokenizer import Message

SUMS = [(a, b) for a in range(1, 20) for b in range(1, 20) if a + b <= 20 or max(a, b) <= 12]
FIRST = (
    "Hello!", "안녕하세요!", "Who are you?", "누구세요?", "Thanks!", "고마워요.", "What is seven plus twelve?", "칠 더하기 십이는?",
    "What is 7 plus 12?", "7 더하기 12는?", "7 + 12?", "7+12", "도윤은 영화를 좋아하고 제주에 살아요. 도윤의 집은 어디에 있어요?",
    "Translate into English: 화가가 사과를 먹었다.",
)  # fmt: skip


def _read(value: int, endings: tuple[str, str], digits: bool) -> str:
    """A Korean number with the ending that fits how it is read: after a consonant, or after a vowel."""
    word = korean.number(value)
    return (str(value) if digits else word) + endings[0 if korean.ends_in_consonant(word) else 1]


def _korean(a: int, b: int, digits: bool) -> tuple[str, set[str]]:
    answers = {_read(a + b, endings, digits) for endings in (("이에요.", "예요."), ("이야.", "야."))}
    return f"{a if digits else korean.number(a)} 더하기 {_read(b, ('은', '는'), digits)}?", answers


def _english(frame: str, a: int, b: int, digits: bool) -> tuple[str, set[str]]:
    one, other, total = (str(value) if digits else english.number(value) for value in (a, b, a + b))
    return frame.format(one, other), {f"It is {total}."}


WAYS: dict[str, Callable[[int, int], tuple[str, set[str]]]] = {
    "What is seven plus twelve?": lambda a, b: _english("What is {} plus {}?", a, b, False),
    "seven plus twelve?": lambda a, b: _english("{} plus {}?", a, b, False),
    "What is 7 plus 12?": lambda a, b: _english("What is {} plus {}?", a, b, True),
    "7+12": lambda a, b: (f"{a}+{b}", {f"{a + b}."}),
    "칠 더하기 십이는?": lambda a, b: _korean(a, b, False),
    "7 더하기 12는?": lambda a, b: _korean(a, b, True),
}


def main() -> None:
    """Ask and count; prints a Markdown table and the first questions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--wrong", type=int, default=10, help="wrong answers shown of each way to ask")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)

    def answers(questions: list[str]) -> list[str]:
        return greedy(model, tokenizer, [[Message("user", question)] for question in questions], 24)

    print("| asked | right | wrong |\n|---|---|---|")
    for name, way in WAYS.items():
        asked = [way(a, b) for a, b in SUMS]
        given = answers([question for question, _ in asked])
        pairs = zip(asked, given, strict=True)
        wrong = [f"{question} {text}" for (question, right), text in pairs if text.strip() not in right]
        print(f"| {name} | {1 - len(wrong) / len(SUMS):.3f} | {'; '.join(wrong[: options.wrong])} |")
    print("\n| first questions | |\n|---|---|")
    for question, text in zip(FIRST, answers(list(FIRST)), strict=True):
        print(f"| {question} | {text} |")


if __name__ == "__main__":
    main()
