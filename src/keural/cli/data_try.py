"""`keural data try`: what a file or a source is, and what becomes of its rows, before there is a recipe.

In: a path and what is known of it. Out: lines for people, and the YAML to paste.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keural.cli.printing import meaning_of
from keural.data.preview.guess import GENERAL, Guess
from keural.data.preview.marked import Span, spans_of
from keural.data.preview.trial import EXAMPLES, Trial, try_path
from keural.data.records import Conversation, Document, PreferencePair, Record
from keural.data.tokens.encode import texts_of
from keural.errors import UserError
from keural.parsing import Malformed, parse_yaml
from keural.terminal import UNDERLINE, show, show_pieces, show_text, underline_words, yaml_text
from keural.tokenizer.chatml import render
from keural.tokenizer.load import KeuralTokenizer
from keural.tokenizer.message import Message

MAX_SHOWN = 1500
"""Characters of a kept row that are shown of each of its texts."""
MAX_NAMES = 12


def show_trials(path: Path, adapter: str | None, given: list[str], tokenizer: Path | None) -> None:
    """Try what `path` is and print what was found. `given` are `data=DIR` and options, `name=value`."""
    data_dir, options = _given(given)
    opened = None if tokenizer is None else open_tokenizer(tokenizer)
    trials = try_path(path, adapter, options, data_dir)
    for number, trial in enumerate(trials):
        if number:
            show("")
        _show_trial(trial, opened)
    if refused := [trial for trial in trials if trial.refusal is not None and not trial.sample]:
        raise UserError(f"{path}: {', '.join(trial.spec.name for trial in refused)}: no row is kept; see above")


def _given(arguments: list[str]) -> tuple[Path | None, dict[str, Any]]:
    data_dir, options = None, {}
    for argument in arguments:
        name, found, text = argument.partition("=")
        if not found:
            raise UserError(f"{argument!r}: give data=DIR, or options of the adapter or format as name=value")
        if name == "data":
            data_dir = Path(text).expanduser()
            if not data_dir.is_dir():
                raise UserError(f"data={text}: no such directory")
            continue
        try:
            options[name.removeprefix("options.")] = parse_yaml(text)
        except Malformed as error:
            raise UserError(f"{argument!r}: {error}") from error
    return data_dir, options


def open_tokenizer(path: Path) -> KeuralTokenizer:
    """The tokenizer of a `.model` file, of a tokenizer or model directory, of a run, or of the run of a recipe."""
    for directory in (path, path / "tokenizer", Path("runs") / path.name / "tokenizer"):
        if directory.is_file() or (directory / "tokenizer.model").is_file():
            return KeuralTokenizer.load(directory)
    raise UserError(f"{path}: no tokenizer there; give a .model file, a directory with one, or a run")


def _show_trial(trial: Trial, tokenizer: KeuralTokenizer | None) -> None:
    counter = trial.counter
    assert counter is not None
    for line in trial.what:
        show(line, "bold")
    looked = "all" if trial.whole else "the first"
    show(f"{looked} {counter.rows:,} rows looked at: {counter.kept:,} kept, {counter.rows - counter.kept:,} dropped")
    if trial.guesses:
        _show_guesses(trial.guesses)
    for hint in trial.hints:
        show(f"note: {hint}")
    if trial.not_read:
        more = f" and {len(trial.not_read) - MAX_NAMES:,} more" if len(trial.not_read) > MAX_NAMES else ""
        show(f"not read: {', '.join(trial.not_read[:MAX_NAMES])}{more}")
    for note, count in counter.noted.most_common():
        show(f"kept, but {note} ({count:,}){meaning_of(note)}")
    if trial.sample:
        show(f"\nkept; trained is what is {underline_words()}", "bold")
    for record in trial.sample[:EXAMPLES]:
        _show_record(record, tokenizer)
    if tokenizer is None and trial.sample:
        show("tokens: not counted; --tokenizer DIR, RUN or FILE.model does", "dim")
    _show_drops(trial)
    if trial.refusal is not None:
        show(f"\nrefused: {trial.refusal}", "bold")
    _show_source(trial)


def _show_guesses(guesses: list[Guess]) -> None:
    best, others = guesses[0], guesses[1:]
    show(f"adapter {best.described()}{f', not {_names(best.unread)}' if best.unread else ''}")
    if best.adapter == "text" and best.score < 0.9:
        show("  only as running text: no adapter of conversations or pairs reads these fields")
    others = sorted(others, key=lambda guess: guess.adapter not in GENERAL)
    second = next((guess for guess in others if guess.adapter != best.adapter or guess.fields != best.fields), None)
    if second is not None:
        show(f"  next: {second.described()}{f', not {_names(second.unread)}' if second.unread else ''}")
    alike = sorted({guess.adapter for guess in others if guess.fields == best.fields and guess.kept >= best.kept} - {best.adapter})
    if alike:
        show(f"  also: {_names(alike)}")


def _names(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def _show_record(record: Record, tokenizer: KeuralTokenizer | None) -> None:
    show(f"[{record.where}{_size(record, tokenizer)}]", "dim")
    for name, spans in spans_of(record).items():
        if isinstance(record, Conversation) and record.good is not None:
            show("(good answer)" if record.good else "(bad answer)", "dim")
        elif isinstance(record, PreferencePair):
            show(f"({name})", "dim")
        show_pieces([(text, UNDERLINE if trained else "") for text, trained in _cut(spans)])


def _cut(spans: list[Span]) -> list[Span]:
    """The spans without the line end after them, long ones with their middle left out."""
    found = []
    for text, trained in spans:
        if len(text) > MAX_SHOWN:
            text = f"{text[: MAX_SHOWN // 2]} [… {len(text) - MAX_SHOWN:,} characters …] {text[-MAX_SHOWN // 2 :]}"
        found.append(Span(text, trained))
    found[-1] = found[-1]._replace(text=found[-1].text.rstrip("\n"))
    return [span for span in found if span.text]


def _size(record: Record, tokenizer: KeuralTokenizer | None) -> str:
    characters = f", {sum(map(len, texts_of(record))):,} characters"
    if tokenizer is None:
        return characters
    if isinstance(record, Document):
        return f"{characters}, {len(tokenizer.encode(record.text)) + 2:,} tokens"
    if isinstance(record, Conversation):
        ids, mask = render(tokenizer, record.messages)
        return f"{characters}, {len(ids):,} tokens, {sum(mask):,} trained"
    sides = [render(tokenizer, [*record.prompt, Message("assistant", text)]) for text in (record.chosen, record.rejected)]
    return f"{characters}, {len(sides[0].ids):,} and {len(sides[1].ids):,} tokens"


def _show_drops(trial: Trial) -> None:
    counter = trial.counter
    assert counter is not None
    for reason, count in counter.drops.most_common():
        show(f"\ndropped {count:,}: {reason}{meaning_of(reason)}", "bold")
        for drop, row in trial.drops.get(reason, ()):
            show(f"[{drop.where}{f': {drop.detail}' if drop.detail else ''}]{f' {row}' if row != 'null' else ''}")


def _show_source(trial: Trial) -> None:
    """The source as a recipe has it."""
    spec = trial.spec
    values: Mapping[str, Any] = spec.model_dump(exclude_defaults=True)
    show(f"\n# under data.sources of a stage with objective {trial.objective}; with data={trial.data_dir}", "dim")
    show_text(f"- {yaml_text(dict(values), flow=True)}")
