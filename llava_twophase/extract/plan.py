"""Which images are missing and into which shards they go, before any work; knows nothing of pixels or towers.

A plan's shards depend on the records and on what earlier, finished extractions left, never on ranks or on what a cut
run sealed: so a run that goes on writes the shards that an uninterrupted one would have written.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_twophase.cache.format import SHARDS, shard_name
from llava_twophase.cache.manifest import Manifest, ShardEntry
from llava_twophase.cache.reader import FeatureCache, check_shard, read_header
from llava_twophase.errors import UserError


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
        work: Shards still to write.
        sealed: Shards of this plan that a cut run sealed.
        cached: Images already in sealed shards.
    """

    first_shard: int
    digest: str
    work: list[ShardWork]
    sealed: list[ShardEntry] = field(default_factory=list)
    cached: int = 0

    @property
    def images(self) -> int:
        """Images still to encode."""
        return sum(len(shard.keys) for shard in self.work)


def make_plan(cache: Path, manifest: Manifest | None, keys: Sequence[str], images_per_shard: int) -> Plan:
    """Plan what is missing.

    Args:
        cache: The cache's directory.
        manifest: Its manifest, or None where there is no cache yet.
        keys: Image keys of the records, each once.
        images_per_shard: Rows of a full shard.

    Returns:
        The plan; without work where all is cached.
    """
    if manifest is None:
        return _plan(keys, 0, images_per_shard)
    sealed = sealed_shards(cache, manifest)
    if not manifest.complete and manifest.plan:
        first = int(manifest.plan["first_shard"])
        plan = _plan(_missing(cache, manifest, keys, sealed[:first]), first, images_per_shard)
        if plan.digest == manifest.plan["digest"]:
            mine = [entry for entry in sealed if _number(entry.file) >= first]
            done = {_number(entry.file) for entry in mine}
            left = [shard for shard in plan.work if shard.number not in done]
            cached = len(keys) - sum(len(shard.keys) for shard in left)
            return Plan(first, plan.digest, left, mine, cached)
    # Another set of records (or shard size) than the cut run had: what it sealed stays, the rest goes into new shards.
    missing = _missing(cache, manifest, keys, sealed)
    first = 1 + max((_number(entry.file) for entry in sealed), default=-1)
    plan = _plan(missing, first, images_per_shard)
    return Plan(first, plan.digest, plan.work, cached=len(keys) - len(missing))


def sealed_shards(cache: Path, manifest: Manifest) -> list[ShardEntry]:
    """List the sealed shards: those of the manifest, then those sealed since it was written, by number.

    Raises:
        UserError: A listed shard is missing or damaged, or a new one belongs to another cache.
    """
    listed = {entry.file: entry for entry in manifest.shards}
    for path in sorted((cache / SHARDS).glob("shard-*.h5")):
        if path.name not in listed and re.fullmatch(r"shard-\d{6,}\.h5", path.name):
            header = read_header(path)
            listed[path.name] = ShardEntry(path.name, header.rows, header.file_bytes, header.xxh3_128)
    entries = sorted(listed.values(), key=lambda entry: _number(entry.file))
    for entry in entries:
        check_shard(cache, entry, manifest.fingerprint)
    return entries


def require_space(folder: Path, needed: int) -> None:
    """Check that the features to come fit on the disk.

    Args:
        folder: Where they go, or its nearest parent that exists.
        needed: Bytes.

    Raises:
        UserError: They do not; with the figures.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the features to extract need {needed / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free; "
            "free some space or give another --feature_cache"
        )


def _plan(keys: Sequence[str], first: int, images_per_shard: int) -> Plan:
    starts = range(0, len(keys), images_per_shard)
    work = [ShardWork(first + i, keys[start : start + images_per_shard]) for i, start in enumerate(starts)]
    digest = hashlib.sha256("\0".join([str(images_per_shard), *keys]).encode("utf-8")).hexdigest()
    return Plan(first, digest, work)


def _missing(cache: Path, manifest: Manifest, keys: Sequence[str], entries: list[ShardEntry]) -> list[str]:
    if not entries:
        return list(keys)
    known = FeatureCache(cache, manifest=Manifest(manifest.fingerprint, {}, 0, True, shards=entries))
    return [key for key in keys if key not in known]


def _number(file: str) -> int:
    return int(file.removeprefix("shard-").removesuffix(".h5"))


def shard_path(cache: Path, number: int) -> Path:
    """Return where a shard is sealed."""
    return cache / SHARDS / shard_name(number)
