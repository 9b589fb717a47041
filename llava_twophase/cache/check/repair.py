"""The manifest made anew from the sealed shards that are whole; knows nothing of images or towers.

A shard describes itself: its header and its attributes hold all that a manifest says of it but the command that made
it. Whatever is not whole is moved to the folder ``damaged`` inside the cache, nothing is deleted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_twophase.cache.check.hdf5_process import Hdf5Checker
from llava_twophase.cache.check.verify import Problem, verify_shards
from llava_twophase.cache.codec import Channels
from llava_twophase.cache.format import (
    FORMAT,
    MANIFEST,
    QUANTISED,
    SCHEMA,
    SHARDS,
    Header,
    StoredDataset,
    fingerprint_hash,
    shard_name,
)
from llava_twophase.cache.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.cache.reader import FeatureCache, read_header
from llava_twophase.errors import UserError

DAMAGED = "damaged"


@dataclass(frozen=True)
class Repair:
    """What a repair came to.

    Attributes:
        manifest: The new manifest.
        lost: Shards to extract again, with the reason: file name to text.
        aside: Those of them that are there, and move to ``damaged``.
        changed: Whether anything is to be written.
    """

    manifest: Manifest
    lost: dict[str, str]
    aside: list[str]
    changed: bool


def plan_repair(path: str | Path, keys: Sequence[str] | None = None) -> Repair:
    """Find out what can be saved; nothing is written.

    Args:
        path: The cache's directory.
        keys: Image keys of the records. Where all are in whole shards or quarantined, the cache is complete, whatever
            its manifest said.

    Returns:
        The repair.

    Raises:
        UserError: There is nothing to make a manifest from, or it is a cache of another format version.
    """
    cache = Path(path)
    folder = cache / SHARDS
    if not folder.is_dir():
        raise UserError(f"{path} has no folder {SHARDS}: there is nothing to repair a cache from")
    old = _old_manifest(cache)
    with Hdf5Checker() as hdf5:
        headers, lost = _headers(folder)
        manifest = _base(folder, headers, old, hdf5)
        fingerprint = fingerprint_hash(manifest.fingerprint)
        for file, header in list(headers.items()):
            if header.fingerprint != fingerprint:
                lost[file] = "its fingerprint is not the one of most: of another cache, or changed"
                del headers[file]
        entries = [ShardEntry(file, part.rows, part.file_bytes, part.xxh3_128) for file, part in headers.items()]
        manifest.shards = entries
        for problem in verify_shards(cache, manifest, hdf5):
            lost.setdefault(_file(problem), problem.what)
    aside = sorted(lost)
    manifest.shards = [entry for entry in entries if entry.file not in lost]
    for file in _expected(old, manifest.shards):
        if file not in headers:
            lost.setdefault(file, "it is missing")
    if not manifest.shards:
        raise UserError(f"{path} has no whole shard; {_reasons(lost)}extract the features again")
    manifest.images_per_shard = max(manifest.images_per_shard, *(entry.rows for entry in manifest.shards))
    manifest.complete = bool(old and old.complete and not lost)
    if keys is not None:
        manifest.complete = _all_there(cache, manifest, keys)
    return Repair(manifest, dict(sorted(lost.items())), aside, old != manifest or bool(aside))


def apply_repair(path: str | Path, repair: Repair) -> None:
    """Move what is not whole aside and replace the manifest; the caller holds the lock of a writer."""
    cache = Path(path)
    for file in repair.aside:
        target = cache / DAMAGED / file
        number = 0
        while target.exists():
            number += 1
            target = target.with_name(f"{file}.{number}")
        target.parent.mkdir(exist_ok=True)
        (cache / SHARDS / file).rename(target)
    write_manifest(cache, repair.manifest)


def _old_manifest(cache: Path) -> Manifest | None:
    try:
        return read_manifest(cache)
    except UserError as error:
        try:
            content = json.loads((cache / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        known = isinstance(content, dict) and content.get("format") == FORMAT
        if known and type(content.get("schema")) is int and content["schema"] != SCHEMA:
            raise error
        return None


def _headers(folder: Path) -> tuple[dict[str, Header], dict[str, str]]:
    headers: dict[str, Header] = {}
    lost: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if re.fullmatch(r"shard-[0-9]{6,18}\.h5", path.name):
            try:
                if path.is_symlink():
                    raise UserError("it is a link; copy what it points to into its place")
                headers[path.name] = read_header(path)
            except UserError as error:
                lost[path.name] = str(error)
    return headers, lost


def _base(folder: Path, headers: dict[str, Header], old: Manifest | None, hdf5: Hdf5Checker) -> Manifest:
    # The manifest without its shards. The old one's fingerprint counts only where shards bear it out.
    votes = Counter(header.fingerprint for header in headers.values())
    if old is not None and fingerprint_hash(old.fingerprint) in votes:
        return Manifest(**{**vars(old), "shards": []})
    for wanted, _ in votes.most_common():
        for file, header in headers.items():
            found = hdf5.attributes(folder / file) if header.fingerprint == wanted else None
            if found:
                software = found["provenance"]
                made = {"vision_tower": software["vision_tower"]} if "vision_tower" in software else {}
                provenance = {"repaired": "the manifest was made anew from the shards", **made, "software": software}
                return Manifest(found["fingerprint"], provenance, 1, channels=_channels(folder / file, header))
    raise UserError(f"{folder} holds no shard that says what made it; extract the features again")


def _channels(path: Path, header: Header) -> dict[str, str]:
    if header.storage not in QUANTISED:
        return {}
    return Channels(*(_column(path, header.datasets[f"channel_{name}"]) for name in ("mean", "std"))).to_json()


def _column(path: Path, data: StoredDataset) -> np.ndarray:
    return np.fromfile(path, data.numpy_dtype, int(np.prod(data.shape)), offset=data.offset)


def _expected(old: Manifest | None, found: Sequence[ShardEntry]) -> list[str]:
    # What the old manifest lists; without one, the gaps in the numbers.
    if old is not None:
        return [entry.file for entry in old.shards]
    numbers = [int(re.sub(r"\D", "", entry.file.removesuffix(".h5"))) for entry in found]
    last = max(numbers, default=-1)
    # A single odd number far off is no reason to name a billion files.
    return [shard_name(number) for number in range(last)] if last < 100 + 10 * len(numbers) else []


def _all_there(cache: Path, manifest: Manifest, keys: Sequence[str]) -> bool:
    left_out = read_quarantine(cache)
    rows = FeatureCache(cache, allow_incomplete=True, manifest=manifest).find(keys)
    return all(row >= 0 or key in left_out for key, row in zip(keys, rows.tolist(), strict=True))


def _file(problem: Problem) -> str:
    return problem.file.removeprefix(f"{SHARDS}/")


def _reasons(lost: dict[str, Any]) -> str:
    return "".join(f"{file}: {why}; " for file, why in list(lost.items())[:5])
