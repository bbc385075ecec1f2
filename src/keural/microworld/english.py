"""English grammar of the micro-world: articles and number words."""

TENS = ("", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ONES = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def with_article(noun: str) -> str:
    """`noun` with its indefinite article: a book, an apple (spelling decides: the world has no word like 'hour')."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def number(value: int) -> str:
    """Number word of 20 to 99."""
    assert 20 <= value <= 99, value
    tens, ones = TENS[value // 10], ONES[value % 10]
    return f"{tens}-{ones}" if ones else tens
