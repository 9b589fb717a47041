"""Which images are missing and into which shards they go, before any work; knows nothing of pixels or towers.

A plan's shards depend on the records and on what earlier, finished extractions left, never on ranks or on what a cut
run sealed or left out: so a run that goes on writes the shards that an uninterrupted one would have written.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_twophase.cache.format import SHARDS, shard_name
from llava_twophase.cache.manifest import Manifest, ShardEntry
from llava_twophase.cache.quarantine import Quarantined, read_parts, read_quarantine
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.shard_files import check_shard, read_header

logger = logging.getLogger(__name__)

StillBad = Callable[[Sequence[Quarantined]], set[str]]
"""Tells which quarantined images have not changed since."""


@dataclass(frozen=True)
class ShardWork:
    """One shard to write."""

    number: int
    keys: Sequence[str]


@dataclass(frozen=True)
class Plan:
    """What an extraction has to do.

    Attributes:
        first_shard: Number of the plan's first shard; the ones before are finished.
        digest: Identifies the plan: its images in order and its shard size.
        goes_on: Whether a cut run had begun with this very plan.
        work: Shards still to write.
        cached: Images of the records that are in sealed shards.
        left_out: Images of the records that are quarantined and have not changed since.
        sealed: The shards that are there.
    """

    first_shard: int
    digest: str
    goes_on: bool = False
    work: list[ShardWork] = field(default_factory=list)
    cached: int = 0
    left_out: list[Quarantined] = field(default_factory=list)
    sealed: list[ShardEntry] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """Images still to encode."""
        return [key for shard in self.work for key in shard.keys]


def make_plan(
    cache: Path, manifest: Manifest | None, keys: Sequence[str], images_per_shard: int, still_bad: StillBad
) -> Plan:
    """Plan what is missing; nothing is written.

    Args:
        cache: The cache's directory.
        manifest: Its manifest, or None where there is no cache yet.
        keys: Image keys of the records, each once.
        images_per_shard: Rows of a full shard.
        still_bad: Tells which quarantined images need no new attempt.

    Returns:
        The plan; without work where all is cached.
    """
    if manifest is None:
        digest, work = _shards(keys, 0, images_per_shard)
        return Plan(0, digest, work=work)
    sealed, parts, quarantine = sealed_shards(cache, manifest), read_parts(cache), read_quarantine(cache)
    # Also the plan of a complete cache, so that a shard that was lost comes back under its own number.
    if manifest.plan:
        first = int(manifest.plan["first_shard"])
        cached = _cached(cache, manifest, keys, [entry for entry in sealed if shard_number(entry.file) < first])
        bad = _known_bad(quarantine.values(), cached, still_bad)
        digest, work = _shards(_without(keys, cached, bad), first, images_per_shard)
        if digest == manifest.plan["digest"]:
            done = {shard_number(entry.file) for entry in sealed}
            left = [shard for shard in work if shard.number not in done and not _all_bad(shard, parts)]
            for part in parts.values():
                bad.update(part)
            cached = _cached(cache, manifest, keys, sealed)
            return Plan(first, digest, True, left, len(cached), _of(keys, bad), sealed)
    # Another set of records (or shard size) than the cut run had: what it sealed stays, the rest goes into new shards.
    cached = _cached(cache, manifest, keys, sealed)
    for part in parts.values():
        quarantine.update(part)
    bad = _known_bad(quarantine.values(), cached, still_bad)
    first = 1 + max((shard_number(entry.file) for entry in sealed), default=-1)
    digest, work = _shards(_without(keys, cached, bad), first, images_per_shard)
    return Plan(first, digest, False, work, len(cached), _of(keys, bad), sealed)


def sealed_shards(cache: Path, manifest: Manifest, known: Iterable[ShardEntry] = ()) -> list[ShardEntry]:
    """List the sealed shards by number: those of the manifest that are there, and those sealed since it was written.

    Args:
        cache: The cache's directory.
        manifest: Its manifest.
        known: Entries that have been checked already.

    Raises:
        UserError: A shard is damaged, or belongs to another cache.
    """
    checked = {entry.file: entry for entry in known}
    listed = {**{entry.file: entry for entry in manifest.shards}, **checked}
    for path in sorted((cache / SHARDS).glob("shard-*.h5")):
        if path.name not in listed and re.fullmatch(r"shard-\d{6,}\.h5", path.name):
            header = read_header(path)
            listed[path.name] = ShardEntry(path.name, header.rows, header.file_bytes, header.xxh3_128)
    for entry in list(listed.values()):
        if not (cache / SHARDS / entry.file).exists():
            logger.warning("%s is gone from %s: its images will be extracted again", entry.file, cache / SHARDS)
            del listed[entry.file]
        elif entry.file not in checked:
            check_shard(cache, entry, manifest.fingerprint)
    return sorted(listed.values(), key=lambda entry: shard_number(entry.file))


def shard_number(file: str) -> int:
    """Return the number in a shard's file name."""
    return int(file.removeprefix("shard-").removesuffix(".h5"))


def shard_path(cache: Path, number: int) -> Path:
    """Return where a shard is sealed."""
    return cache / SHARDS / shard_name(number)


def _shards(keys: Sequence[str], first: int, images_per_shard: int) -> tuple[str, list[ShardWork]]:
    starts = range(0, len(keys), images_per_shard)
    work = [ShardWork(first + i, keys[start : start + images_per_shard]) for i, start in enumerate(starts)]
    digest = hashlib.sha256("\0".join([str(images_per_shard), *keys]).encode("utf-8")).hexdigest()
    return digest, work


def _cached(cache: Path, manifest: Manifest, keys: Sequence[str], entries: list[ShardEntry]) -> set[str]:
    if not entries:
        return set()
    known = FeatureCache(cache, manifest=Manifest(**{**vars(manifest), "complete": True, "shards": entries}))
    return {key for key, row in zip(keys, known.find(keys).tolist(), strict=True) if row >= 0}


def _known_bad(entries: Iterable[Quarantined], cached: Collection[str], still_bad: StillBad) -> dict[str, Quarantined]:
    asked = [entry for entry in entries if entry.key not in cached]
    same = still_bad(asked) if asked else set()
    return {entry.key: entry for entry in asked if entry.key in same}


def _without(keys: Sequence[str], *others: Collection[str]) -> list[str]:
    return [key for key in keys if not any(key in other for other in others)]


def _of(keys: Sequence[str], entries: dict[str, Quarantined]) -> list[Quarantined]:
    return [entries[key] for key in keys if key in entries]


def _all_bad(shard: ShardWork, parts: dict[str, dict[str, Quarantined]]) -> bool:
    # Such a shard has no file, only the list of what it leaves out.
    return parts.get(shard_name(shard.number), {}).keys() >= set(shard.keys)
