"""Rebuild a cache's manifest from its intact shards.

A shard's header and attributes hold everything that a manifest states about it, except the command that made it. Shards
that are not intact are moved to the folder ``damaged`` in the cache; nothing is deleted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_twophase.cache.check.hdf5_process import Hdf5Checker
from llava_twophase.cache.check.verify import verify_shards
from llava_twophase.cache.codec import Channels
from llava_twophase.cache.format import FORMAT, MANIFEST, QUANTISED, SCHEMA, SHARDS, fingerprint_hash, shard_name
from llava_twophase.cache.header import Header
from llava_twophase.cache.local import ShardFile
from llava_twophase.cache.manifest import Manifest, ShardEntry, read_manifest
from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.session import CacheSession
from llava_twophase.cache.shard_files import read_header
from llava_twophase.errors import UserError

DAMAGED = "damaged"


@dataclass(frozen=True)
class Repair:
    """The result of planning a repair.

    Attributes:
        manifest: The new manifest.
        lost: Shards to extract again: file name to reason.
        aside: The lost shards that exist; they are moved to ``damaged``.
        changed: Whether the repair writes or moves anything.
    """

    manifest: Manifest
    lost: dict[str, str]
    aside: list[str]
    changed: bool


def plan_repair(path: str | Path, keys: Sequence[str] | None = None) -> Repair:
    """Find out what can be saved, without writing anything.

    Args:
        path: The cache's directory.
        keys: Image keys of the records. If every key is in an intact shard or quarantined, the cache is complete,
            whatever its manifest stated.

    Raises:
        UserError: There is nothing to build a manifest from, or the cache has another format version.
    """
    cache = Path(path)
    if not (cache / SHARDS).is_dir():
        raise UserError(f"{path} has no folder {SHARDS}: there is nothing to repair a cache from")
    old = _old_manifest(cache)
    headers, lost = _read_headers(cache / SHARDS)
    with Hdf5Checker() as hdf5:
        manifest = _rebuild(cache / SHARDS, headers, old, hdf5)
        own, foreign = _split_by_fingerprint(headers, manifest)
        manifest.shards = [_entry(file, header) for file, header in own.items()]
        lost |= foreign
        for problem in verify_shards(cache, manifest, hdf5):
            lost.setdefault(problem.file.removeprefix(f"{SHARDS}/"), problem.what)
    aside = sorted(lost)
    manifest.shards = [entry for entry in manifest.shards if entry.file not in lost]
    for file in _expected_files(old, manifest.shards):
        if file not in own:
            lost.setdefault(file, "it is missing")
    if not manifest.shards:
        reasons = "".join(f"{file}: {why}; " for file, why in list(lost.items())[:5])
        raise UserError(f"{path} has no intact shard; {reasons}extract the features again")
    manifest.images_per_shard = max(manifest.images_per_shard, *(entry.rows for entry in manifest.shards))
    manifest.complete = bool(old and old.complete and not lost)
    if keys is not None:
        manifest.complete = _has_all(cache, manifest, keys)
    return Repair(
        manifest=manifest,
        lost=dict(sorted(lost.items())),
        aside=aside,
        changed=old != manifest or bool(aside),
    )


def apply_repair(session: CacheSession, repair: Repair) -> None:
    """Move damaged shards to the folder ``damaged`` and replace the manifest.

    Args:
        session: Holds the cache's lock.
        repair: The result of ``plan_repair``.
    """
    cache = session.cache
    for file in repair.aside:
        target = cache / DAMAGED / file
        number = 0
        while target.exists():
            number += 1
            target = target.with_name(f"{file}.{number}")
        target.parent.mkdir(exist_ok=True)
        (cache / SHARDS / file).rename(target)
    session.replace(repair.manifest)


def _old_manifest(cache: Path) -> Manifest | None:
    # The manifest on disk; None if it is missing or damaged.
    try:
        return read_manifest(cache)
    except UserError as error:
        try:
            content = json.loads((cache / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        ours = isinstance(content, dict) and content.get("format") == FORMAT
        if ours and type(content.get("schema")) is int and content["schema"] != SCHEMA:
            raise error
        return None


def _read_headers(folder: Path) -> tuple[dict[str, Header], dict[str, str]]:
    # The headers of readable shards, and the reasons for the other ones.
    headers: dict[str, Header] = {}
    lost: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if re.fullmatch(r"shard-[0-9]{6,18}\.h5", path.name):
            try:
                if path.is_symlink():
                    raise UserError("it is a link; copy the file itself into its place")
                headers[path.name] = read_header(path)
            except UserError as error:
                lost[path.name] = str(error)
    return headers, lost


def _rebuild(folder: Path, headers: Mapping[str, Header], old: Manifest | None, hdf5: Hdf5Checker) -> Manifest:
    # The manifest without its shards. The old one is used if a shard has its fingerprint; otherwise the fingerprint of
    # most shards counts.
    votes = Counter(header.fingerprint for header in headers.values())
    if old is not None and fingerprint_hash(old.fingerprint) in votes:
        return Manifest(**{**vars(old), "shards": []})
    for fingerprint, _ in votes.most_common():
        for file, header in headers.items():
            found = hdf5.attributes(folder / file) if header.fingerprint == fingerprint else None
            if found is None:
                continue
            software = found["provenance"]
            tower = {"vision_tower": software["vision_tower"]} if "vision_tower" in software else {}
            provenance = {"repaired": "the manifest was rebuilt from the shards", **tower, "software": software}
            channels = _read_channels(folder / file, header)
            return Manifest(found["fingerprint"], provenance, images_per_shard=1, channels=channels)
    raise UserError(f"{folder} has no shard that states what made it; extract the features again")


def _read_channels(path: Path, header: Header) -> dict[str, str]:
    if header.storage not in QUANTISED:
        return {}
    file = ShardFile(path)
    mean, std = (file.read_dataset(header.datasets[f"channel_{name}"]) for name in ("mean", "std"))
    return Channels(mean, std).to_json()


def _split_by_fingerprint(
    headers: Mapping[str, Header], manifest: Manifest
) -> tuple[dict[str, Header], dict[str, str]]:
    # The shards with the manifest's fingerprint, and the reason why each other one does not belong to the cache.
    fingerprint = fingerprint_hash(manifest.fingerprint)
    own = {file: header for file, header in headers.items() if header.fingerprint == fingerprint}
    reason = "its fingerprint is not the one of most shards: it belongs to another cache, or changed"
    return own, dict.fromkeys(headers.keys() - own.keys(), reason)


def _entry(file: str, header: Header) -> ShardEntry:
    return ShardEntry(file, header.rows, header.file_bytes, header.xxh3_128)


def _expected_files(old: Manifest | None, found: Sequence[ShardEntry]) -> list[str]:
    # The files that the old manifest lists; without one, the gaps in the numbers.
    if old is not None:
        return [entry.file for entry in old.shards]
    numbers = [int(re.sub(r"\D", "", entry.file.removesuffix(".h5"))) for entry in found]
    last = max(numbers, default=-1)
    # One file with a huge number must not make this list a billion others.
    return [shard_name(number) for number in range(last)] if last < 100 + 10 * len(numbers) else []


def _has_all(cache: Path, manifest: Manifest, keys: Sequence[str]) -> bool:
    quarantined = read_quarantine(cache)
    rows = FeatureCache(cache, allow_incomplete=True, manifest=manifest).find(keys)
    return all(row >= 0 or key in quarantined for key, row in zip(keys, rows.tolist(), strict=True))
