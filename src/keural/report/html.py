"""The report of a run: one HTML file with everything in it, no network, readable in light and dark.

In: a `Run`, finished or not. Out: `report.html` in its directory. The page is a template beside this file, which escapes text from
the run; charts are SVG made here.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from keural.errors import visible
from keural.files import write_atomic
from keural.report import alignment, panels, tables
from keural.report.collect import Run
from keural.report.scores.table import scores

FILE_NAME = "report.html"


def write_report(run: Run) -> Path:
    """Write `report.html` into the run's directory and return its path.

    Parts that the run does not have (yet) are left out of the page.
    """
    path = run.directory / FILE_NAME
    write_atomic(path, render(run))
    return path


def render(run: Run) -> str:
    """The page as a string."""
    environment = Environment(
        loader=PackageLoader("keural.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    return environment.get_template("report.html.jinja").render(_content(run))


def _shown(value: Any) -> Any:
    """Text without characters that hide or turn what is around them; charts are markup already."""
    if isinstance(value, Markup):
        return Markup(visible(value))
    return visible(value) if isinstance(value, str) else value


def _content(run: Run) -> dict[str, Any]:
    return {
        "run": run,
        "description": run.recipe.get("description") or "",
        "ended": run.ended.strftime("%Y-%m-%d %H:%M %Z") if run.ended else "",
        "unfinished": [stage.name for stage in run.stages if not stage.finished],
        "tiles": tables.tiles(run),
        "stages": tables.stages(run),
        "scores": scores(run.evaluation),
        "evaluation": tables.evaluation(run),
        "bits_per_byte": tables.bits_per_byte(run),
        "samples": run.summary.get("samples") or [],
        "curves": panels.curves(run),
        "expert_load": panels.expert_load(run),
        "load_maps": panels.load_maps(run),
        "preferences": panels.preferences(run),
        "alarms": alignment.alarms(run),
        "checks": alignment.checks(run),
        "by_source": alignment.by_source(run),
        "lengths": alignment.lengths(run),
        "data": tables.data(run),
        "notes": run.recipe.get("notes") or [],
    }
