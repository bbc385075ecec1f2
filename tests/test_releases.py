"""The range of tested releases is one table; whatever else names it agrees."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from keural.releases import TESTED

ROOT = Path(__file__).resolve().parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def bound(library: str) -> Requirement:
    dependencies = tomllib.loads(text("pyproject.toml"))["project"]["dependencies"]
    (found,) = (found for found in map(Requirement, dependencies) if found.name == library)
    return found


@pytest.mark.parametrize("library", TESTED)
def test_the_bounds_admit_every_tested_release(library: str) -> None:
    assert all(bound(library).specifier.contains(release) for release in TESTED[library])
    assert list(TESTED[library]) == sorted(TESTED[library], key=Version)


def test_the_lower_bound_of_transformers_is_the_oldest_tested() -> None:
    (lower,) = (part for part in bound("transformers").specifier if part.operator == ">=")
    assert Version(lower.version) == Version(TESTED["transformers"][0])


@pytest.mark.parametrize("library", TESTED)
def test_the_constraints_are_the_newest_tested(library: str) -> None:
    (pinned,) = re.findall(rf"^{library}==(\S+)$", text("constraints.txt"), re.MULTILINE)
    assert pinned == TESTED[library][-1]


def test_the_makefile_tests_each_of_them() -> None:
    (releases,) = re.findall(r"^RELEASES := (.+)$", text("Makefile"), re.MULTILINE)
    assert tuple(releases.split()) == TESTED["transformers"]


@pytest.mark.parametrize("page", ["README.md", "docs/engines.md"])
def test_the_pages_name_the_range(page: str) -> None:
    oldest, newest = TESTED["transformers"][0], TESTED["transformers"][-1]
    assert f"transformers {oldest} to {newest}" in " ".join(text(page).split())


def test_the_tests_of_the_edges_are_there() -> None:
    (paths,) = re.findall(r"^EDGE_TESTS := (.+?)(?<!\\)\n", text("Makefile"), re.MULTILINE | re.DOTALL)
    assert [path for path in paths.replace("\\\n", " ").split() if not (ROOT / path).exists()] == []
