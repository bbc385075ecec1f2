"""English grammar of the micro-world: articles and number words."""

TENS = ("", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
TEENS = (
    "", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
ONES = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def with_article(noun: str) -> str:
    """`noun` with its indefinite article: a book, an apple (spelling decides: the world has no word like 'hour')."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def number(value: int) -> str:
    """Number word of 1 to 99."""
    assert 1 <= value <= 99, value
    if 10 < value < 20:
        return TEENS[value - 10]
    tens, ones = TENS[value // 10], ONES[value % 10]
    return f"{tens}-{ones}" if tens and ones else tens or ones
