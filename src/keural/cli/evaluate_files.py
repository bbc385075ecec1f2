"""`keural evaluate answers`, `judgements`, `export-tasks`: what is written for judges and harnesses, and what they say."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from keural.cli.options import names_of
from keural.limits import LARGEST_ANSWER, LARGEST_SEED
from keural.terminal import note, show, show_table, work_progress


def add_commands(app: typer.Typer) -> None:
    """Put the commands beside `keural evaluate`."""
    app.command("answers")(write_answers)
    app.command("judgements")(show_judgements)
    app.command("export-tasks")(export)


def write_answers(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="a model directory that knows chats")],
    questions: Annotated[Path, typer.Argument(metavar="QUESTIONS", help="question.jsonl of MT-Bench, questions.jsonl of LogicKor")],
    out: Annotated[Path, typer.Argument(metavar="FILE", help="where the answers are written, in FastChat's form")],
    name: Annotated[str | None, typer.Option(help="what the model is called there (default: its recipe and stage)")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=LARGEST_ANSWER, help="an answer is cut after so many")] = 1024,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="of the categories that are not answered greedily")] = 0,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
) -> None:
    """Answer MT-Bench's or LogicKor's questions, both turns, for a judge elsewhere."""
    from keural.evaluate.generated.fastchat import read_questions, write_answers_file, write_chats
    from keural.evaluate.models import Conditions, stored_model
    from keural.files import check_output

    check_output(out)
    asked = read_questions(questions)
    opened = stored_model(model, Conditions("chat", system=system), name)
    with work_progress() as tell:
        tell(f"{len(asked):,} questions")
        answers = write_chats(opened.network, opened.asking, asked, max_new_tokens, seed)
    write_answers_file(out, opened.name, asked, answers)
    cut = sum(written.end in ("length", "context") for turns in answers for written in turns)
    show(f"{out}: answers to {len(asked):,} questions{f', {cut:,} cut before their end' if cut else ''}")


def show_judgements(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="judgements of FastChat (mode single) or of LogicKor's evaluator")],
    questions: Annotated[Path | None, typer.Option(help="the questions, for their categories")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures for programs")] = None,
) -> None:
    """What a judge said: mean scores from 0 to 10 with 95% intervals, by turn and category; questions are what is independent."""
    from dataclasses import asdict

    from keural.evaluate.generated.fastchat import read_judgements, read_questions
    from keural.files import check_output, write_json

    if json_file is not None:
        check_output(json_file, "--json")
    categories = {} if questions is None else {question.id: question.category for question in read_questions(questions)}
    found = read_judgements(file, categories)
    columns: dict[str, Literal["left", "right"]] = {"of": "left", "score": "right", "95%": "right", "judgements": "right"}
    for each in found:
        parts = {"all": each.overall, **{f"turn {turn}": judged for turn, judged in each.by_turn.items()}, **each.by_category}
        rows = [[part, f"{one.mean:.2f}", f"{one.low:.2f}-{one.high:.2f}", f"{one.judgements:,}"] for part, one in parts.items()]
        show_table(each.model, columns, rows)
        if each.unjudged:
            note(f"({each.model}: {each.unjudged:,} judgements have no score and are left out)")
    if json_file is not None:
        write_json(json_file, {"models": {each.model: asdict(each) for each in found}})


def export(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="a new directory")],
    tasks: Annotated[str, typer.Option(metavar="NAME,...", help="as for `keural evaluate`")] = "",
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="where the sets lie")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, max=100, help="solved examples before each item (default: the task's)")
    ] = None,
) -> None:
    """Write tasks as lm-eval's, for `lm_eval --include_path DIR --tasks keural_NAME`, which runs them offline."""
    from keural.evaluate.harness.export import PREFIX, export_tasks
    from keural.evaluate.tasks.library import select
    from keural.evaluate.tasks.loading import load

    loaded = [load(spec, data, shots) for spec in select(names_of("--tasks", tasks), data)]
    left_out = export_tasks(loaded, out)
    for name, reason in left_out.items():
        note(f"({name} is left out: {reason})")
    written = [f"{PREFIX}{task.spec.name}" for task in loaded if task.spec.name not in left_out]
    show(f"{out}: {', '.join(written) or 'no task'}")
