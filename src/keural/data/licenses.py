"""Licences, languages and flags of sources, and what a recipe leaves out because of them."""

import re
from fnmatch import fnmatchcase

from keural.data.adapters import adapter_of
from keural.recipe import DataSpec, SourceSpec

NON_COMMERCIAL = re.compile(r"(?<![A-Z])NC(?![A-Z])|non-?commercial", re.IGNORECASE)


def license_of(source: SourceSpec) -> str | None:
    """The licence that the recipe states, or else the publisher of a set that is known by its adapter's name."""
    return source.license or adapter_of(source).license


def language_of(source: SourceSpec) -> str | None:
    """The language that the recipe states, or else the one that a set known by its adapter's name is in."""
    return source.language or adapter_of(source).language


def flags_of(source: SourceSpec) -> list[str]:
    """What is to be known of a source before it is trained on: `benchmark`, `non-commercial`."""
    license_id = license_of(source)
    flags = ["benchmark"] if adapter_of(source).benchmark else []
    return [*flags, "non-commercial"] if license_id and NON_COMMERCIAL.search(license_id) else flags


def left_out(spec: DataSpec, source: SourceSpec) -> str | None:
    """Why the recipe leaves a source out, by its licence or because it is a benchmark; None where it does not."""
    license_id, flags = license_of(source), flags_of(source)
    if not spec.benchmarks and "benchmark" in flags:
        return "benchmark"
    names = {license_id or "unknown", *(flag for flag in flags if flag == "non-commercial")}
    if any(fnmatchcase(name.lower(), pattern.lower()) for name in names for pattern in spec.licenses.exclude):
        return f"licence {license_id or 'unknown'}"
    allowed = spec.licenses.allow
    if allowed and not any(fnmatchcase((license_id or "").lower(), pattern.lower()) for pattern in allowed):
        return f"licence {license_id or 'unknown'}"
    return None
