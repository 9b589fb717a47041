"""Sizes and checksums of files, stored when they are written and compared when they are read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from llava_twophase.errors import UserError
from llava_twophase.train.loop.artefacts import write_json

_BLOCK = 2**22
_CHECKSUM = "xxh3_128"


def file_checksums(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return size and XXH3-128 of files, by their path relative to a folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, _CHECKSUM: _digest(path)}
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
            elif content and _digest(folder / name) != stored[_CHECKSUM]:
                problems.append(f"{name} differs from its checksum")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
    return problems


def write_checked_json(path: Path, content: dict[str, Any]) -> None:
    """Write or replace a JSON file that holds a checksum of its own content."""
    write_json(path, {**content, _CHECKSUM: _content_checksum(content)})


def read_checked_json(path: Path) -> dict[str, Any]:
    """Read what ``write_checked_json`` wrote.

    Raises:
        UserError: The file is missing or damaged; the message has its name.
    """
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        stored = content.pop(_CHECKSUM)
    except FileNotFoundError:
        raise UserError(f"{path.name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path.name} is damaged, or was written by an earlier version") from None
    if _content_checksum(content) != stored:
        raise UserError(f"{path.name} differs from its checksum")
    return content


def _content_checksum(content: dict[str, Any]) -> str:
    # Does not depend on the order of the keys.
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
