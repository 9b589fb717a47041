"""``quarantine.jsonl``: the images that an extraction could not use, and why.

One JSON object per line, UTF-8, in the order of image keys::

    {"key": "00453/004539375.jpg", "reason": "cannot be decoded: ...", "source_sha256": "9f86...", "source_size": 4711}

``source_sha256`` (hex) and ``source_size`` are those of the file when it was read, null if it could not be read. A
quarantined image is tried again only after they have changed. During an extraction, each shard's part of the quarantine
is a file beside it, ``shards/shard-NNNNNN.h5.quarantine.jsonl``, so that a killed run keeps both or neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_twophase.cache.format import QUARANTINE, SHARDS
from llava_twophase.cache.storage import Storage, open_storage
from llava_twophase.errors import UserError
from llava_twophase.files import replace_file

PART = ".quarantine.jsonl"


@dataclass(frozen=True)
class Quarantined:
    """One image that could not be used.

    Attributes:
        key: Image key.
        reason: Why.
        source_size: The file's size in bytes; None if it could not be read.
        source_sha256: Its SHA-256 (hex), or None.
    """

    key: str
    reason: str
    source_size: int | None = None
    source_sha256: str | None = None


def read_quarantine(cache: str | Path | Storage) -> dict[str, Quarantined]:
    """Read which images are quarantined in a cache.

    Args:
        cache: The cache's directory, its URL, or its storage.

    Returns:
        Image key to entry, in file order; empty if no image is quarantined.

    Raises:
        UserError: The file is damaged.
    """
    storage = open_storage(cache)
    if storage.folder is not None:
        return _read(storage.folder / QUARANTINE)
    return _parse(storage.read_file(QUARANTINE) or b"", f"{storage}/{QUARANTINE}")


def write_quarantine(cache: Path, entries: Iterable[Quarantined]) -> None:
    """Replace ``quarantine.jsonl``; without entries, remove it."""
    _write(cache / QUARANTINE, entries)


def write_part(shard: Path, entries: Iterable[Quarantined]) -> None:
    """Write a shard's part of the quarantine, before the shard is sealed; without entries, remove an earlier part."""
    _write(shard.with_name(shard.name + PART), entries)


def read_parts(cache: Path) -> dict[str, dict[str, Quarantined]]:
    """Read the parts of an unfinished extraction: shard file name to its quarantined images."""
    parts = sorted((cache / SHARDS).glob(f"shard-*{PART}"))
    return {path.name.removesuffix(PART): _read(path) for path in parts}


def merge_parts(cache: Path, tried: Iterable[str]) -> None:
    """Move an extraction's parts into ``quarantine.jsonl``.

    Args:
        cache: The cache's directory.
        tried: Image keys of the extraction. Their older entries are removed; each is cached now or is in a part.
    """
    entries = read_quarantine(cache)
    for key in tried:
        entries.pop(key, None)
    for part in read_parts(cache).values():
        entries.update(part)
    write_quarantine(cache, (entries[key] for key in sorted(entries)))
    for path in (cache / SHARDS).glob(f"shard-*{PART}"):
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Quarantined]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}; delete the file to try its images again") from None
    return _parse(data, str(path))


def _parse(data: bytes, path: str) -> dict[str, Quarantined]:
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: {error}; delete the file to try its images again") from None
    entries: dict[str, Quarantined] = {}
    for number, line in enumerate(lines, 1):
        if line:
            try:
                entry = _entry(json.loads(line))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{path} line {number} is damaged ({error}); delete the file to try its images again"
                ) from None
            entries[entry.key] = entry
    return entries


def _entry(content: Any) -> Quarantined:
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    entry = Quarantined(**content)
    kinds = {"key": str, "reason": str, "source_size": int | None, "source_sha256": str | None}
    wrong = [name for name, kind in kinds.items() if not isinstance(getattr(entry, name), kind)]
    if wrong:
        raise ValueError(f"its {wrong[0]} has the wrong type")
    return entry


def _write(path: Path, entries: Iterable[Quarantined]) -> None:
    text = "".join(json.dumps(asdict(entry), sort_keys=True, ensure_ascii=False) + "\n" for entry in entries)
    if not text:
        path.unlink(missing_ok=True)
        return
    with replace_file(path, "w") as file:
        file.write(text)
