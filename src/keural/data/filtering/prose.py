"""What people wrote in a text: its prose, without code, JSON, markup, formulas, addresses and the names of variables.

In: the text of a turn. Out: what is left of it, and shares of scripts among its letters. A gate that judges a language, or looks
for what an unfinished export leaves behind, looks at prose only: `{name}` in a program is no gap, and a program is in no language.
"""

import json
import re
from collections.abc import Iterator

HANGUL = re.compile("[가-힣ㄱ-ㅎㅏ-ㅣ\u1100-\u11ff]")
LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
_LETTER = re.compile(r"[^\W\d_]")
_BLOCK = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`"
    r"|\$\$.{0,2000}?\$\$|\$[^$\n]{1,300}\$|\\\(.{0,500}?\\\)|\\\[.{0,2000}?\\\]|\\begin\{.{0,2000}?\\end\{[^}\n]{0,40}\}",
    re.DOTALL,
)
"""Code in fences and back quotes, and formulas."""
_ADDRESS = re.compile(r"(?:https?|ftp)://\S+|\bwww\.\S+|[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{1,64}|(?:/[\w.-]{1,64}){2,10}")
_LINK = re.compile(r"!?\[([^\[\]\n]{0,200})\]\([^()\n]{0,500}\)")
"""A link of Markdown; what stands in the brackets is read."""
_TAG = re.compile(r"<[!?/]?[A-Za-z][^<>\n]{0,200}>")
_MANY_TAGS = 3
"""A text with so many closing tags is a page or a file, from the first to the last."""
_LIST_ITEM = re.compile(r"\s*-\s")
_LONGEST_ENTRY = 80
_NAME = re.compile(r"\b[A-Za-z]{1,40}(?:_[A-Za-z0-9]{1,40}){1,8}\b|\b[a-z]{1,40}(?:[A-Z][a-z0-9]{1,40}){1,8}\b|\b\w{1,40}\(\)")
"""snake_case, camelCase, call()."""
_CODE_LINE = re.compile(
    r"""\s*(?:
      [\[{]?\s*["'][\w .:-]{1,60}["']\s*:                               # a line of an object
    | [\[\]{}();,]+\s*$
    | (?=.*[(=\[{]).*[;{]\s*$
    | .*;\s*\}\s*$
    | (?:for|while|until|if|elif)\b.*;\s*(?:do|then)\s*$
    | (?:done|fi|esac|else|then|do|end|EOF)\s*;?\s*$
    | (?:echo|printf|puts|console\.log)\b
    | (?:def|class|import|from|return|for|while|if|elif|else|try|except|with|print|public|private|static|void|int|const|let|var
        |function|struct|package|using|namespace|export|async|await|fn|func|end)\b(?=.*[(){}=:;.]).*[(){};:=\]]\s*$
    | (?:import|from|using|package|export)\s+[\w.*{}"'<>/ ,-]+(?:\s+(?:import|as|from)\s+.*)?;?\s*$
    | (?:SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP|FROM|WHERE|(?:GROUP|ORDER)\ BY|(?:(?:INNER|LEFT)\ )?JOIN|LIMIT|VALUES)\b
    | (?:\$|>>>|\.\.\.|>)\s+\S
    | (?:git|npm|npx|yarn|pip3?|conda|docker|kubectl|sudo|apt(?:-get)?|brew|curl|wget|python3?|cd|mkdir|chmod|export)\s+[\w./~-]+
        (?:\s+[\w./~=@:'"-]+){0,8}\s*$
    | [A-Za-z_][\w.]{0,60}(?:\[[^\]\n]{0,60}\]){0,3}\s*(?:[-+*/%|&:]?=(?!=)|<-)\s*\S
    | [A-Za-z_][\w.]{0,60}\([^\n]*\)\s*[;:{]?\s*(?:[#/].*)?$
    | \#(?:include|define|!)|//|/\*|@[A-Za-z_][\w.]*(?:\(.*\))?\s*$
    )""",
    re.VERBOSE,
)
"""A line that a programmer wrote for a machine."""
_COMMENT = re.compile(r"\s*(?:#|--|\*|%)")
_KEY = re.compile(r"\s*(?:-\s*)?[a-z_][\w-]{0,40}:(?:\s|$)")
_CELL_END = re.compile(r",(?=\S)|\t")
_DECODER = json.JSONDecoder()
_MAX_FAILURES = 30
"""So many brackets that open no JSON are tried in a text."""


def prose_of(text: str) -> str:
    """The text without what is not written for a reader. Hangul stays wherever it stands between code."""
    text = without_code(text)
    text = _TAG.sub(" ", _LINK.sub(r"\1", text))
    return _NAME.sub(" ", _ADDRESS.sub(" ", text))


def without_code(text: str) -> str:
    """The text without code, formulas and JSON, in fences or not; tags, links and addresses stay."""
    text = _without_page(_without_json(_BLOCK.sub(" ", text)))
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and not HANGUL.search(text) and (_is_yaml(lines) or _is_table(lines)):
        return ""
    kept = _prose_lines(lines)
    if 2 * len(kept) <= len(lines):  # a program, whose other lines are its comments
        kept = [line for line in kept if not _COMMENT.match(line) or HANGUL.search(line)]
    return "\n".join(kept)


def _is_yaml(lines: list[str]) -> bool:
    """Whether all lines are keys with short values, or items of lists below them; long ones are sentences about a word."""
    keys = sum(_KEY.match(line) is not None for line in lines)
    return keys > 1 and all(len(line) <= _LONGEST_ENTRY and (_KEY.match(line) or _LIST_ITEM.match(line)) for line in lines)


def _is_table(lines: list[str]) -> bool:
    """Whether all lines have as many cells, and more than two, with commas that no space follows, or tabs between them."""
    cells = {len(_CELL_END.findall(line)) for line in lines}
    return len(cells) == 1 and cells.pop() > 1


def _without_page(text: str) -> str:
    """The text without HTML or XML, if it is more than a few tags; lines of it with Hangul stay."""
    first = _TAG.search(text) if text.count("</") >= _MANY_TAGS else None
    if first is None:
        return text
    end = text.rfind(">") + 1
    page = (line for line in text[first.start() : end].split("\n") if HANGUL.search(line))
    return "\n".join((text[: first.start()], *page, text[end:]))


def _prose_lines(lines: list[str]) -> list[str]:
    """Lines that are no code: neither by their form, nor by being indented below code. Those with Hangul are kept."""
    kept, in_code = [], False
    for line in lines:
        in_code = bool(_CODE_LINE.match(line)) or (in_code and line[0].isspace())
        if not in_code or HANGUL.search(line):
            kept.append(line)
    return kept


def _without_json(text: str) -> str:
    """The text without objects and lists of JSON that hold something."""
    if "{" not in text and "[" not in text:
        return text
    kept, start, failures = [], 0, 0
    for place in _brackets(text):
        if place < start:
            continue
        end = _json_end(text, place)
        if end is None:
            failures += 1
            if failures > _MAX_FAILURES:
                break
            continue
        kept += [text[start:place], " "]
        start = end
    return "".join(kept) + text[start:]


def _brackets(text: str) -> Iterator[int]:
    return (match.start() for match in re.finditer(r"[\[{](?=\s*[\"\[{\]}\dtfn-])", text))


def _json_end(text: str, start: int) -> int | None:
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return end if value else None


def script_share(text: str, script: re.Pattern[str], least: int) -> float | None:
    """Share of a script among the letters of a text; None where there are fewer than `least`, too few to tell."""
    letters = len(_LETTER.findall(text))
    return len(script.findall(text)) / letters if letters >= least else None


_FANCY = "\uff21-\uff3a\uff41-\uff5a\U0001d400-\U0001d7cb"
"""Full-width and mathematical letters, which are Latin ones in disguise even where a word has no others."""
_FOREIGN = (
    f"{_FANCY}\u0400-\u052f\u13a0-\u13fd\u0391\u0392\u0395-\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf"
)
"""Letters that pass for Latin ones: also Cyrillic, Cherokee, and of Greek those that look the same; its others stand beside Latin
letters in units and formulas.
"""
_WORD = re.compile(rf"[A-Za-z\u00c0-\u024f{_FOREIGN}]{{3,64}}")
"""Two letters are as often a symbol with its index."""
_DISGUISE = re.compile(f"[{_FOREIGN}]")
_READ_AS_LATIN = re.compile(f"[A-Za-z\u00c0-\u024f{_FANCY}]")


def disguised_words(text: str) -> tuple[int, list[str]]:
    """How many words are written in Latin letters or in what passes for them, and those of them that hold a letter of another
    script that looks like a Latin one. A word that is wholly Cyrillic or Greek is not among either.
    """
    words = [word for word in _WORD.findall(text) if _READ_AS_LATIN.search(word)]
    return len(words), [] if text.isascii() else [word for word in words if not word.isascii() and _DISGUISE.search(word)]
