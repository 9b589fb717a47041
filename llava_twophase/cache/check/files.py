"""Compare the files of a cache with its manifest, by their names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_twophase.cache.format import MANIFEST, QUARANTINE, SHARDS
from llava_twophase.cache.local import LocalStorage
from llava_twophase.cache.manifest import Manifest
from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.cache.storage import Storage
from llava_twophase.errors import UserError

COPY = "copy it again from an intact cache"
AGAIN = f"run the same extraction command again, or {COPY}"


@dataclass(frozen=True)
class Problem:
    """One fault of a cache.

    Attributes:
        file: The file, relative to the cache.
        what: What is wrong.
        fix: What to do.
        note: The cache can be used as it is.
    """

    file: str
    what: str
    fix: str
    note: bool = False


def manifest_problems(manifest: Manifest) -> Iterator[Problem]:
    """Yield why a cache cannot be complete."""
    if not manifest.complete:
        what = "the extraction was interrupted, or is still running"
        yield Problem(MANIFEST, what, "run the same extraction command again")
    elif not manifest.shards:
        yield Problem(MANIFEST, "it lists no shards", "extract the features again")


def quarantine_problems(storage: Storage) -> Iterator[Problem]:
    """Yield why the quarantine cannot be read."""
    try:
        read_quarantine(storage)
    except UserError as error:
        yield Problem(QUARANTINE, str(error), f"or {COPY}")


def folder_problems(cache: Path, manifest: Manifest) -> Iterator[Problem]:
    """Compare the directory with the manifest."""
    yield from manifest_problems(manifest)
    if not inside(cache, cache / QUARANTINE):
        yield outside(QUARANTINE)
    else:
        yield from quarantine_problems(LocalStorage(cache))
    if not inside(cache, cache / SHARDS):
        yield outside(SHARDS)
        return
    try:
        found = sorted(os.listdir(cache / SHARDS))
    except OSError as error:
        yield Problem(SHARDS, f"it cannot be read: {error.strerror}", "copy the cache again from an intact one")
        return
    yield from _file_problems(manifest, found)


def _file_problems(manifest: Manifest, found: list[str]) -> Iterator[Problem]:
    # Compare the names of the files in the folder of shards with the manifest.
    complete = manifest.complete
    listed = Counter(entry.file for entry in manifest.shards)
    for name in found:
        if name.endswith(".tmp"):
            yield Problem(f"{SHARDS}/{name}", "a work file of an interrupted extraction", "delete it", note=True)
        elif name.endswith(".h5") and name not in listed:
            fix = "move it elsewhere" if complete else "run the same extraction command again, which adds it"
            yield Problem(f"{SHARDS}/{name}", f"it is extra: {MANIFEST} does not list it", fix, note=not complete)
    for name, times in listed.items():
        if times > 1:
            yield Problem(MANIFEST, f"it lists {name} {times} times", COPY)
        if name not in found:
            yield Problem(f"{SHARDS}/{name}", "it is missing", AGAIN)


def inside(cache: Path, path: Path) -> bool:
    """Return whether a path, with its links followed, is in the cache's directory."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(cache))


def outside(name: str) -> Problem:
    """Return the problem of a link that leads out of the cache."""
    return Problem(name, "it is a link that leads out of the cache", "copy the file itself into its place")
