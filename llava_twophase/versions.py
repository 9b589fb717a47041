"""The releases of the libraries that were tested; others are refused, before they fail in a confusing way."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

from llava_twophase.errors import combined_error

SUPPORTED = {"transformers": ">=5.24,<6", "deepspeed": ">=0.19,<1", "torch": ">=2.6"}
"""As in pyproject.toml; constraints.txt has the exact releases that were tested."""


def require_supported(*names: str) -> None:
    """Refuse releases outside the supported ranges.

    Args:
        names: Libraries to check, keys of ``SUPPORTED``.

    Raises:
        UserError: With each release that was found and the range that is expected.
    """
    found = {name: version(name) for name in names}
    outside = [
        f"{name} {release} is installed, llava-twophase needs {name}{SUPPORTED[name]}"
        for name, release in found.items()
        if not SpecifierSet(SUPPORTED[name]).contains(release, prereleases=True)
    ]
    if outside:
        raise combined_error(outside, "untested libraries; pip install -c constraints.txt llava-twophase")
