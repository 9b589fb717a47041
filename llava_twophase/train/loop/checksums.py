"""Sizes and checksums of files, stored when they are written and compared when they are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

_BLOCK = 2**22


def file_checksums(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return size and XXH3-128 of files, by their path relative to a folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": _digest(path)}
        for path in sorted(files)
    }


def damaged_files(folder: Path, expected: dict[str, dict[str, Any]], content: bool = True) -> list[str]:
    """Compare files with their stored sizes and checksums.

    Args:
        folder: The folder that their paths are relative to.
        expected: As ``file_checksums`` returned it.
        content: Read the files; otherwise only their sizes are compared.

    Returns:
        A line for each file that is missing or differs.
    """
    problems = []
    for name, stored in expected.items():
        try:
            size = (folder / name).stat().st_size
            if size != stored["bytes"]:
                problems.append(f"{name} has {size} bytes, expected {stored['bytes']}")
            elif content and _digest(folder / name) != stored["xxh3_128"]:
                problems.append(f"{name} differs from its checksum")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
    return problems


def content_checksum(content: dict[str, Any]) -> str:
    """Return the XXH3-128 of a JSON object, which does not depend on the order of its keys."""
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
