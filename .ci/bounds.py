"""Constraints for an environment at one end of what the package admits: `python .ci/bounds.py newest|oldest > FILE`.

In: `pyproject.toml` and the index that pip is set up with. Out: one line per package for `pip install -c`. The oldest end pins
every dependency, those of the extras included, to its lower bound. Either end pins torch to the newest or oldest release of which
there is a build for CPUs; where the index marks none as such, to the one in `constraints.txt`, since others may bring gigabytes.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "schemathesis", "ruff", "mypy")
"""What only tests and checks need; the newest will do."""


def lower_bounds() -> dict[str, str]:
    """Lower bound of each dependency by name, without the tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    found = {}
    for line in lines:
        match = re.fullmatch(r"([\w-]+)(?:\[[\w,-]+\])?>=([\d.]+).*", line)
        if match and match[1] not in TOOLS:
            found[match[1]] = match[2]
    return found


def cpu_builds(at_least: str) -> list[str]:
    """Releases of torch for CPUs alone, newest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    builds = sorted(set(re.findall(r"\b([\d.]+\+cpu)\b", listed)), key=numbers, reverse=True)
    return [build for build in builds if numbers(build) >= numbers(at_least)]


def numbers(release: str) -> list[int]:
    """To compare by."""
    return [int(part) for part in release.split("+")[0].split(".")]


def torch_release(end: str, at_least: str) -> str:
    """The torch to test with."""
    (pinned,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    builds = cpu_builds(at_least) or [pinned]
    return builds[0] if end == "newest" else builds[-1]


def main() -> None:
    """Print the constraints."""
    if len(sys.argv) != 2 or sys.argv[1] not in ("newest", "oldest"):
        sys.exit(f"usage: {sys.argv[0]} newest|oldest")
    bounds = lower_bounds()
    torch = torch_release(sys.argv[1], bounds.pop("torch"))
    print(f"torch=={torch}")
    if sys.argv[1] == "oldest":
        print(*(f"{name}=={release}" for name, release in bounds.items()), sep="\n")


if __name__ == "__main__":
    main()
