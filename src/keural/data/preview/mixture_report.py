"""The Korean–English mixture of a stage: per source and per language, planned by the recipe or as the data was prepared.

In: a stage's `DataSpec`, or the table of prepared data. Out: plain data for JSON, and a Markdown table. The `basis` says what
shares are of: tokens where the data is prepared, else the records that the recipe expects, else its weights.
"""

from typing import Any

from keural.data.licenses import language_of, left_out, license_of
from keural.data.source_counts import SourceRow
from keural.recipe import DataSpec, Unit

UNSTATED = "unstated"
Report = dict[str, Any]


def planned(spec: DataSpec) -> Report:
    """What a recipe says about its mixture: `expect` (and `repeat`), or weights. Sources that it leaves out are not counted."""
    parts = [source for source in spec.sources if not left_out(spec, source)]
    weighted = spec.mixing is not None
    rows = [
        {
            "source": source.name,
            "language": language_of(source) or source.text_kind or UNSTATED,
            "license": license_of(source),
            "records": source.expect,
            "tokens": None,
            "repeats": None if weighted else source.repeat,
            "target": source.weight,
            "amount": source.weight if weighted else None if source.expect is None else source.expect * source.repeat,
        }
        for source in parts
    ]
    return _report("planned", "weights" if weighted else "records", rows)


def prepared(table: list[SourceRow], unit: Unit = "tokens") -> Report:
    """What prepared data holds for training; with a mixture what an epoch does. `unit` is what shares are of."""
    rows = []
    for entry in table:
        if entry.split != "train" or entry.left_out:
            continue
        mixture = entry.mixture
        records = mixture.records if mixture else entry.repeat * (entry.kept - entry.heldout)
        tokens = mixture.tokens if mixture else entry.tokens
        rows.append(
            {
                "source": entry.source,
                "language": entry.language or entry.text_kind or UNSTATED,
                "license": entry.license,
                "records": records,
                "tokens": tokens,
                "repeats": mixture.repeats if mixture else entry.repeat,
                "target": mixture.target if mixture else None,
                "amount": tokens if unit == "tokens" else records,
            }
        )
    return _report("prepared", "tokens" if unit == "tokens" else "records", rows)


def _report(state: str, basis: str, rows: list[dict[str, Any]]) -> Report:
    """Rows with their shares, and the totals by language; without shares where a source's amount is not stated."""
    known = all(row["amount"] is not None for row in rows)
    total = sum(row["amount"] for row in rows) if known else None
    targets = sum(row["target"] or 0 for row in rows)
    for row in rows:
        row["share"] = row["amount"] / total if total else None
        row["target"] = row["target"] / targets if row["target"] else None
    languages = {name: _language(name, rows, total) for name in sorted({row["language"] for row in rows})} if total else {}
    return {"state": state, "basis": basis, "total": total, "rows": rows, "languages": languages}


def _language(name: str, rows: list[dict[str, Any]], total: float) -> dict[str, float]:
    amount = sum(row["amount"] for row in rows if row["language"] == name)
    return {"amount": amount, "share": amount / total}


def markdown(name: str, report: Report, notes: list[str]) -> str:
    """The report as a Markdown table, languages below it; with the recipe's notes where it states no amounts."""
    lines = [f"## {name} ({report['state']}, shares of {report['basis']})", ""]
    lines += ["| source | language | licence | records | tokens | repeats | planned | share |", "|---|---|---|--:|--:|--:|--:|--:|"]
    for row in report["rows"]:
        cells = [row["source"], row["language"], row["license"] or UNSTATED, _count(row["records"]), _count(row["tokens"])]
        cells += ["" if row["repeats"] is None else f"{row['repeats']:.3g}", _share(row["target"]), _share(row["share"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [""]
    if report["languages"]:
        parts = (f"{key} {_count(part['amount'])} ({part['share']:.1%})" for key, part in report["languages"].items())
        lines.append(f"{_count(report['total'])} {report['basis']}: {', '.join(parts)}")
    else:
        lines += ["The recipe states no amounts of these sources; its notes:", *(f"- {note}" for note in notes)]
    return "\n".join([*lines, ""])


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
