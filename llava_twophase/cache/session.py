"""Exclusive write access to a cache's folder: its lock, its manifest, and which shards it holds.

Rules 10 to 12 of the format are kept here and in ``shard_writer.py``; no other module writes a manifest.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_twophase.cache.format import MANIFEST, SHARDS, fingerprint_hash, shard_name
from llava_twophase.cache.local import LocalStorage
from llava_twophase.cache.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from llava_twophase.cache.quarantine import merge_parts
from llava_twophase.cache.shard_files import ShardFiles, read_header
from llava_twophase.errors import UserError

logger = logging.getLogger(__name__)

# Seconds that an update of the manifest may take after every shard. A slower one waits for so many times its length.
_CHEAP, _SHARE = 0.1, 50


class CacheSession:
    """Holds the writer's lock of a cache and replaces its manifest; a context.

    The lock ends with the process, however it ends. Readers need no lock. On a file system without locks (some NFS and
    Lustre mounts) the user must not run two writers.

    Args:
        cache: The cache's directory; it is created if it does not exist.
        read: Whether to read and check the manifest. ``repair`` does not: it replaces a damaged one.

    Attributes:
        found: The manifest as it was when the lock was taken; None if the cache is new.

    Raises:
        UserError: Another process is writing to the cache, or the folder is not a feature cache.
    """

    def __init__(self, cache: Path, read: bool = True) -> None:
        self.cache, self._read = cache, read
        self.found: Manifest | None = None
        self._current: Manifest | None = None
        self._lock = -1
        self._next_update = 0.0

    def __enter__(self) -> CacheSession:
        if self._read:
            existing_manifest(self.cache)  # refuses a folder that is not a cache, before anything is created in it
        (self.cache / SHARDS).mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.cache / SHARDS, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"another process is writing to {self.cache}; wait until it ends, or stop it") from None
        except OSError as error:
            logger.debug("%s cannot be locked: %s", self.cache, error)
        try:
            if self._read:
                self.found = self._current = existing_manifest(self.cache)
        except UserError:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    @property
    def manifest(self) -> Manifest:
        """The manifest as it was last read or written."""
        if self._current is None:
            raise ValueError(f"{self.cache} has no manifest yet; call begin first")
        return self._current

    def require_unchanged(self, seen: Manifest | None) -> None:
        """Check that the manifest is still the one that the caller planned from.

        Raises:
            UserError: Another process has replaced it.
        """
        if self.found != seen:
            raise UserError(f"another process has changed {self.cache} since this one read it; run the command again")

    def begin(self, manifest: Manifest, sealed: Sequence[ShardEntry], plan: dict[str, Any]) -> None:
        """Remove the work files of an interrupted run and mark the cache incomplete.

        Args:
            manifest: What made the cache; its plan and shards are replaced.
            sealed: The sealed shards.
            plan: What ``Manifest.plan`` describes.
        """
        for path in [*self.cache.glob("*.tmp"), *(self.cache / SHARDS).glob("*.tmp")]:
            path.unlink(missing_ok=True)
        self.replace(replace(manifest, complete=False, plan=plan, shards=list(sealed)))

    def update(self) -> Manifest:
        """Write the shards sealed since the last call into the manifest, and return it."""
        started = time.monotonic()
        shards = sealed_shards(self.cache, self.manifest, self.manifest.shards)
        if shards != self.manifest.shards:
            self.replace(replace(self.manifest, shards=shards))
        seconds = time.monotonic() - started
        self._next_update = time.monotonic() + (_SHARE * seconds if seconds > _CHEAP else 0.0)
        return self.manifest

    def update_sometimes(self) -> None:
        """Call ``update`` after a shard was sealed, unless that would take more than 2 % of the time.

        Writing the manifest takes longer with every shard. Shards that it does not list yet are found when the
        extraction is resumed.
        """
        if time.monotonic() >= self._next_update:
            self.update()

    def merge_quarantine(self, tried: Iterable[str]) -> None:
        """Move the quarantine parts beside the shards into ``quarantine.jsonl``; see ``quarantine.merge_parts``."""
        merge_parts(self.cache, tried)

    def complete(self) -> None:
        """Mark the cache complete.

        Raises:
            UserError: The cache holds no features.
        """
        if not self.manifest.rows:
            raise UserError(f"{self.cache} holds no features, so it is not complete; add at least one row")
        self.replace(replace(self.manifest, complete=True))

    def replace(self, manifest: Manifest) -> None:
        """Replace the manifest."""
        write_manifest(self.cache, manifest)
        self._current = manifest


def existing_manifest(cache: Path) -> Manifest | None:
    """Read the manifest of a cache that exists; None for a new or empty folder.

    Raises:
        UserError: The folder holds something else, or its manifest is damaged.
    """
    if (cache / MANIFEST).is_file():
        return read_manifest(cache)
    ours = (SHARDS, f"{MANIFEST}.tmp")
    if cache.exists() and (not cache.is_dir() or any(path.name not in ours for path in cache.iterdir())):
        raise UserError(f"{cache} exists and is not a feature cache; give a new or empty folder")
    return None


def sealed_shards(cache: Path, manifest: Manifest, known: Iterable[ShardEntry] = ()) -> list[ShardEntry]:
    """List the sealed shards by number: those in the manifest that exist, and those sealed since it was written.

    Args:
        cache: The cache's directory.
        manifest: Its manifest.
        known: Entries that have been checked already.

    Raises:
        UserError: A shard is damaged, or belongs to another cache.
    """
    folder, present = cache / SHARDS, _files_in(cache / SHARDS)
    checked = {entry.file: entry for entry in known}
    listed = {**{entry.file: entry for entry in manifest.shards}, **checked}
    for name in sorted(present - listed.keys()):
        if re.fullmatch(r"shard-\d{6,}\.h5", name):
            header = read_header(folder / name)
            listed[name] = ShardEntry(name, header.rows, header.file_bytes, header.xxh3_128)
    missing = [file for file in listed if file not in present and not (folder / file).exists()]
    for file in missing:
        logger.warning("%s is missing from %s: its images will be extracted again", file, folder)
        del listed[file]
    unchecked = [entry for entry in listed.values() if entry.file not in checked]
    files, fingerprint = ShardFiles(LocalStorage(cache), unchecked), fingerprint_hash(manifest.fingerprint)
    for shard in range(len(unchecked)):
        files.header(shard, fingerprint)
    return sorted(listed.values(), key=lambda entry: shard_number(entry.file))


def _files_in(folder: Path) -> set[str]:
    # One request lists many files. Asking for each is slow on a network file system with 100,000 shards.
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_symlink() or os.path.exists(entry.path)}
    except FileNotFoundError:
        return set()


def software_plan(manifest: Manifest, software: dict[str, Any]) -> dict[str, Any]:
    """Return what ``Manifest.plan`` records about the software of new shards: only what differs from the cache's."""
    return {} if software == manifest.recorded_software else {"software": software}


def report_software(manifest: Manifest, current: dict[str, Any], resumed: bool) -> None:
    """Warn if new shards are written under other versions than those that the cache records.

    Args:
        manifest: The cache's manifest.
        current: The software of this run.
        resumed: Whether the run resumes the manifest's plan. All shards of a plan record the same software, so that
            their bytes do not depend on where it was interrupted.
    """
    recorded = manifest.software if resumed else manifest.recorded_software
    changes = [
        f"{name} {recorded.get(name)} -> {current.get(name)}"
        for name in sorted(recorded.keys() | current.keys())
        if recorded.get(name) != current.get(name)
    ]
    if changes and resumed:
        logger.warning(
            "the interrupted run had other software: %s; its remaining shards record the former", ", ".join(changes)
        )
    elif changes:
        logger.warning("the cache was made with other software: %s; new shards record the latter", ", ".join(changes))


def shard_number(file: str) -> int:
    """Return the number in a shard's file name."""
    return int(file.removeprefix("shard-").removesuffix(".h5"))


def shard_path(cache: Path, number: int) -> Path:
    """Return the path of a sealed shard."""
    return cache / SHARDS / shard_name(number)


def next_shard_number(sealed: Iterable[ShardEntry]) -> int:
    """Return the number after the largest one that is used."""
    return 1 + max((shard_number(entry.file) for entry in sealed), default=-1)
