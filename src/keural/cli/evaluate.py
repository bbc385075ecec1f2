"""`keural evaluate`: how good is a model, or every stage of a run."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from keural.cli.evaluate_compare import compare
from keural.cli.evaluate_files import add_commands
from keural.cli.evaluate_harness import HarnessAsked, allowed
from keural.cli.evaluate_kept import keep_in_run, with_run_figures
from keural.cli.options import names_of
from keural.errors import UserError
from keural.limits import LARGEST
from keural.terminal import show, show_table, work_progress

if TYPE_CHECKING:
    from keural.evaluate.evaluation import Evaluated
    from keural.evaluate.models import EvaluatedModel
    from keural.evaluate.results.records import TaskResults
    from keural.evaluate.tasks.loading import LoadedTask
    from keural.pipeline.evaluated import Evaluation

MODEL_COMMAND = "model"


class _ModelFirst(TyperGroup):
    """`keural evaluate PATH`: whatever is no other command's name is a path or an option, a directory that is called model, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_other = args and args[0] not in self.commands and args[0] not in ctx.help_option_names
        if is_other or (args[:1] == [MODEL_COMMAND] and not self._name_a_path(ctx, args[1:])):
            args = [MODEL_COMMAND, *args]
        found: list[str] = super().parse_args(ctx, args)
        return found

    def _name_a_path(self, ctx: Any, args: list[str]) -> bool:
        """Whether they hold a path, so that what stands before them is the command, as the usage writes it."""
        command = self.commands[MODEL_COMMAND]
        return command.make_context(MODEL_COMMAND, list(args), ctx, resilient_parsing=True).params.get("path") is not None


app = typer.Typer(
    cls=_ModelFirst,
    no_args_is_help=True,
    help="Measure a model, or every finished stage of a run: keural evaluate PATH --data DIR (`keural evaluate model --help`).",
)
add_commands(app)

app.command("compare")(compare)


@app.command(MODEL_COMMAND)
def evaluate_model(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL|RUN_DIR", help="a model directory, or a run: every finished stage, and the untrained model"),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...", help="tasks by name, YAML files, or ko, en: those whose sets are there (default: all such)"
        ),
    ] = "",
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where the sets lie; `keural data fetch evaluation DIR` brings them")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, max=100, help="solved examples before each item (default: the task's)")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, max=LARGEST, help="only the first so many items of each task")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="ask in a chat, as a user's turn")] = False,
    bos: Annotated[bool, typer.Option("--bos/--no-bos", help="texts begin with <s>")] = True,
    system: Annotated[str | None, typer.Option(help="system message, with --chat")] = None,
    too_long: Annotated[
        Literal["leave-out", "cut"], typer.Option(help="items that the context does not hold: left out, or cut at their beginning")
    ] = "leave-out",
    dtype: Annotated[Literal["stored", "float32", "bfloat16", "float16"], typer.Option(help="of the weights in memory")] = "stored",
    engine: Annotated[str, typer.Option(help="what computes: transformers")] = "transformers",
    results: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where results are kept (default: results in the run, else here)")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the figures for programs")] = None,
    harness: Annotated[
        str, typer.Option(metavar="NAME,...", help="tasks of lm-eval, run by it on this model (extra keural[eval])")
    ] = "",
    include: Annotated[Path | None, typer.Option(metavar="DIR", help="with --harness: tasks for lm-eval of your own")] = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="run programs that the model wrote, in processes with limits (docs/evaluation.md)")
    ] = False,
    list_tasks: Annotated[bool, typer.Option("--list", help="list the tasks, and nothing else")] = False,
) -> None:
    """Measure a model, or every finished stage of a run, on tasks; what was computed before is not computed again."""
    if list_tasks:
        return _list(data)
    if path is None:
        raise UserError("give a model directory or a run directory, e.g. runs/toy/final; --list lists the tasks")
    from keural.evaluate.models import Conditions
    from keural.evaluate.tasks.library import select
    from keural.evaluate.tasks.loading import load
    from keural.files import check_output, write_json
    from keural.pipeline.evaluated import what_to_evaluate

    if include is not None and not harness:
        raise UserError("--include is for --harness; a task of keural's is named by its file in --tasks")
    if chat and not bos:
        raise UserError("--no-bos is for texts; a chat begins as chats do")
    prompting: Literal["bos", "text", "chat"] = "chat" if chat else "bos" if bos else "text"
    conditions = Conditions(prompting, dtype, engine, too_long, system)
    if json_file is not None:
        check_output(json_file, "--json")
    names, harness_names = names_of("--tasks", tasks), names_of("--harness", harness)
    what = what_to_evaluate(path, conditions, results)
    specs = [] if harness_names and not names else allowed(select(names, data), names, run_code)
    ask_harness = HarnessAsked(harness_names, include, shots, limit, run_code) if harness_names else None
    found = _measured(what, [load(spec, data, shots) for spec in specs], limit, conditions.prompting, ask_harness)
    kept = keep_in_run(path, found, limit) if what.is_run and results is None else None
    if json_file is not None:
        figures = _as_json(found, what.is_run, json_file.absolute().parent)
        write_json(json_file, figures if kept is None else with_run_figures(figures, kept))
    show(f"results, item by item: {what.results}")
    return None


EvaluatedByModel = dict[str, list["Evaluated"]]


def _measured(
    what: "Evaluation", tasks: "list[LoadedTask]", limit: int | None, prompting: str, harness: HarnessAsked | None = None
) -> EvaluatedByModel:
    """Every model asked every task; its table is shown when it is finished."""
    from keural.evaluate.evaluation import evaluate

    found: EvaluatedByModel = {}
    asked = [task for task in tasks if prompting != "chat" or task.spec.kind != "rolling"]
    if not asked and harness is None:
        raise UserError("texts are read as they stand, not in a chat; leave --chat out")
    for model in what.models:
        with work_progress() as tell:
            found[model.name] = [evaluate(model, task, what.results, limit, tell) for task in asked]
            if harness is not None:
                tell(f"{model.name}: lm-eval")
                found[model.name] += harness.of(model, what.results)
        model.close()
        _show(model, found[model.name])
    return found


def _show(model: "EvaluatedModel", found: "list[Evaluated]") -> None:
    """A model's scores, and below them what stands beside each."""
    columns: dict[str, Literal["left", "right"]] = {
        "task": "left", "score": "right", "95%": "right", "items": "right", "chance": "right"
    }  # fmt: skip
    show_table(f"{model.name} ({model.conditions.prompting}, {model.conditions.dtype})", columns, [_row(each) for each in found])
    for evaluated in found:
        if beside := _beside(evaluated.results):
            show(f"  {evaluated.results.task}: {beside}")


def _row(evaluated: "Evaluated") -> list[str]:
    results, score = evaluated.results, _score(evaluated)
    low, high = score["low"], score["high"]
    return [
        results.task,
        "-" if score["score"] is None else f"{score['score']:.3f}{' b/B' if results.kind == 'rolling' else ''}",
        "" if low is None or high is None else f"{low:.3f}-{high:.3f}",
        f"{score['n']:,}",
        "" if results.chance is None else f"{results.chance:.3f}",
    ]


def _beside(results: "TaskResults") -> str:
    """Other rules' scores, scores of who does not read, and what was left out or cut."""
    others = next((list(item.details.get("scores", {}))[1:] for item in results.items), [])
    said = [f"{rule} {sum(item.details['scores'][rule] for item in results.items) / len(results.items):.3f}" for rule in others]
    said += [f"{name} {value:.3f}" for name, value in results.baselines.items()]
    said += [f"{count:,} left out ({reason})" for reason, count in results.left_out.items()]
    cut = sum(1 for item in results.items if item.details.get("cut"))
    return ", ".join([*said, *([f"{cut:,} cut at their beginning"] if cut else [])])


def _score(evaluated: "Evaluated", items: str | None = None) -> dict[str, Any]:
    """The figures of a task; no score where no item could be asked."""
    from keural.evaluate.statistics.summary import summarize

    results = evaluated.results
    if not results.items:
        return {"score": None, "low": None, "high": None, "n": 0, "chance": results.chance, "items": items}
    return summarize(results, items).to_json()


def _as_json(found: EvaluatedByModel, is_run: bool, directory: Path) -> dict[str, Any]:
    """The figures for programs; `items` is the path of the file with the items, from the directory that the figures go to."""
    models = {
        name: {"tasks": {evaluated.results.task: _task_json(evaluated, directory) for evaluated in tasks}}
        for name, tasks in found.items()
    }
    return {"stages": models} if is_run else next(iter(models.values()))


def _task_json(evaluated: "Evaluated", directory: Path) -> dict[str, Any]:
    results = evaluated.results
    found = _score(evaluated, os.path.relpath(evaluated.file.absolute(), directory))
    more = {"left_out": dict(results.left_out), "baselines": dict(results.baselines)}
    return found | {name: value for name, value in more.items() if value}


def _list(data: Path | None) -> None:
    """The tasks of the package, and of which the sets are there."""
    from keural.evaluate.tasks.library import shipped
    from keural.evaluate.tasks.places import is_there

    columns: dict[str, Literal["left", "right"]] = {"task": "left", "language": "left", "kind": "left", "what": "left"}
    rows = []
    for spec in shipped().values():
        where = "needs none" if spec.made is not None else "there" if data is not None and is_there(spec.places, data) else "-"
        there = [] if data is None else [where]
        rows.append([spec.name, spec.language, spec.kind, spec.title, *there])
    show_table("tasks", columns if data is None else {**columns, f"in {data}": "left"}, rows)
