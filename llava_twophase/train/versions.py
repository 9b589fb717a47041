"""Which releases of the libraries that a run leans on have been tested; anything else is refused, with a sentence."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

from llava_twophase.errors import combined_error

SUPPORTED = {"transformers": ">=5.24,<6", "deepspeed": ">=0.19,<1", "torch": ">=2.6"}
"""As in pyproject.toml; what was tested exactly is in constraints.txt."""


def require_supported() -> None:
    """Refuse releases outside the ranges.

    Raises:
        UserError: With each one found and expected.
    """
    found = {name: version(name) for name in SUPPORTED}
    outside = [
        f"{name} {release} is installed, llava-twophase needs {name}{SUPPORTED[name]}"
        for name, release in found.items()
        if not SpecifierSet(SUPPORTED[name]).contains(release, prereleases=True)
    ]
    if outside:
        raise combined_error(outside, "untested libraries; pip install -c constraints.txt llava-twophase")
