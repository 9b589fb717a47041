"""Plans an extraction: which images are not cached yet, and which shards they go into.

A plan's shards depend on the records and on earlier, finished extractions. They do not depend on the number of ranks,
or on what an interrupted run sealed or quarantined, so a resumed run writes the shards of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llava_twophase.cache.format import shard_name
from llava_twophase.cache.manifest import Manifest, ShardEntry
from llava_twophase.cache.quarantine import Quarantined, read_parts, read_quarantine
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.session import next_shard_number, sealed_shards, shard_number

StillBad = Callable[[Sequence[Quarantined]], set[str]]
"""Returns which quarantined images have not changed since they were tried."""


@dataclass(frozen=True)
class ShardWork:
    """One shard to write."""

    number: int
    keys: Sequence[str]


@dataclass(frozen=True)
class Plan:
    """The work of an extraction.

    Attributes:
        first_shard: Number of the plan's first shard; earlier shards are finished.
        digest: Identifies the plan by its images in order and its shard size.
        resumes: Whether the last extraction had this plan.
        work: Shards to write.
        cached: Number of images of the records that are in sealed shards.
        quarantined: Images of the records that are quarantined and have not changed since.
        sealed: The shards that exist.
    """

    first_shard: int
    digest: str
    resumes: bool = False
    work: list[ShardWork] = field(default_factory=list)
    cached: int = 0
    quarantined: list[Quarantined] = field(default_factory=list)
    sealed: list[ShardEntry] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """Images to encode."""
        return [key for shard in self.work for key in shard.keys]


def make_plan(
    cache: Path, manifest: Manifest | None, keys: Sequence[str], images_per_shard: int, still_bad: StillBad
) -> Plan:
    """Plan an extraction; nothing is written.

    Args:
        cache: The cache's directory.
        manifest: Its manifest, or None for a new cache.
        keys: Image keys of the records, each once.
        images_per_shard: Rows of a full shard.
        still_bad: Returns which quarantined images need no new attempt.

    Returns:
        The plan; without work if all images are cached.
    """
    if manifest is None:
        return _divide(keys, 0, images_per_shard)
    contents = _Contents(cache, manifest, still_bad)
    return contents.resumed_plan(keys, images_per_shard) or contents.new_plan(keys, images_per_shard)


class _Contents:
    # What a cache holds, compared with the records.

    def __init__(self, cache: Path, manifest: Manifest, still_bad: StillBad) -> None:
        self._cache = cache
        self._manifest = manifest
        self._still_bad = still_bad
        self._sealed = sealed_shards(cache, manifest)
        self._parts = read_parts(cache)
        self._quarantine = read_quarantine(cache)

    def resumed_plan(self, keys: Sequence[str], images_per_shard: int) -> Plan | None:
        """Return the last extraction's plan if it is the same again, else None.

        A complete cache has one too, so that a lost shard is extracted again under its own number.
        """
        if "digest" not in self._manifest.plan:
            return None
        first = int(self._manifest.plan["first_shard"])
        cached = self._cached(keys, [entry for entry in self._sealed if shard_number(entry.file) < first])
        bad = self._unchanged(self._quarantine.values(), cached)
        plan = _divide(_without(keys, cached, bad), first, images_per_shard)
        if plan.digest != self._manifest.plan["digest"]:
            return None
        sealed = {shard_number(entry.file) for entry in self._sealed}
        work = [shard for shard in plan.work if shard.number not in sealed and not self._has_no_rows(shard)]
        for part in self._parts.values():
            bad.update(part)
        cached = self._cached(keys, self._sealed)
        return replace(
            plan,
            resumes=True,
            work=work,
            cached=len(cached),
            quarantined=[bad[key] for key in keys if key in bad],
            sealed=self._sealed,
        )

    def new_plan(self, keys: Sequence[str], images_per_shard: int) -> Plan:
        """Return a plan that keeps sealed shards and puts the other images into new ones."""
        cached = self._cached(keys, self._sealed)
        quarantine = dict(self._quarantine)
        for part in self._parts.values():
            quarantine.update(part)
        bad = self._unchanged(quarantine.values(), cached)
        plan = _divide(_without(keys, cached, bad), next_shard_number(self._sealed), images_per_shard)
        quarantined = [bad[key] for key in keys if key in bad]
        return replace(plan, cached=len(cached), quarantined=quarantined, sealed=self._sealed)

    def _cached(self, keys: Sequence[str], entries: list[ShardEntry]) -> set[str]:
        if not entries:
            return set()
        known = FeatureCache(self._cache, manifest=replace(self._manifest, complete=True, shards=entries))
        return {key for key, row in zip(keys, known.find(keys).tolist(), strict=True) if row >= 0}

    def _unchanged(self, entries: Iterable[Quarantined], cached: Collection[str]) -> dict[str, Quarantined]:
        asked = [entry for entry in entries if entry.key not in cached]
        same = self._still_bad(asked) if asked else set()
        return {entry.key: entry for entry in asked if entry.key in same}

    def _has_no_rows(self, shard: ShardWork) -> bool:
        # All its images are quarantined: such a shard has no file, only its part of the quarantine.
        return self._parts.get(shard_name(shard.number), {}).keys() >= set(shard.keys)


def _divide(keys: Sequence[str], first: int, images_per_shard: int) -> Plan:
    starts = range(0, len(keys), images_per_shard)
    work = [ShardWork(first + i, keys[start : start + images_per_shard]) for i, start in enumerate(starts)]
    digest = hashlib.sha256("\0".join([str(images_per_shard), *keys]).encode("utf-8")).hexdigest()
    return Plan(first, digest, work=work)


def _without(keys: Sequence[str], *others: Collection[str]) -> list[str]:
    return [key for key in keys if not any(key in other for other in others)]
