"""The releases of torch and transformers that this package is tested with: the one place where they are written down.

In: nothing. Out: the releases, and which installed one lies outside. The Makefile's RELEASES, `constraints.txt`, the bounds in
`pyproject.toml` and the pages that name the range are held to it by a test.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

TESTED: dict[str, tuple[str, ...]] = {
    "transformers": ("5.17.0", "5.19.0", "5.23.0", "5.24.0"),
    "torch": ("2.13.0",),
}
"""Oldest first; what lies between two of them is taken for tested."""
BUILT_ON = (
    *TESTED, "tokenizers", "sentencepiece", "safetensors", "pydantic", "typer", "datasets", "datatrove", "trl", "peft",
)  # fmt: skip
"""The libraries whose releases a test run is told by: `python -m keural.releases` prints them."""


def installed_release(library: str) -> str:
    """Its release as installed, without what a build adds to it (`+cpu`, `.dev0`)."""
    return Version(version(library)).base_version


def outside_tested() -> list[str]:
    """One phrase for each library whose installed release is older or newer than those tested, e.g. to end a sentence with."""
    phrases = []
    for library, tested in TESTED.items():
        installed = installed_release(library)
        if Version(installed) > Version(tested[-1]):
            phrases.append(f"{library} {installed} is newer than {tested[-1]}, the newest tested")
        elif Version(installed) < Version(tested[0]):
            phrases.append(f"{library} {installed} is older than {tested[0]}, the oldest tested")
    return phrases


def installed_releases() -> str:
    """The installed releases of `BUILT_ON`, on one line."""
    return ", ".join(f"{library} {_version(library)}" for library in BUILT_ON)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    from keural.terminal import show

    show(installed_releases())
