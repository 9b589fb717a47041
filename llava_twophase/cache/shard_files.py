"""The open shards of a cache.

Threads share them, and a forked process opens its own. The number of files that are kept open does not depend on the
number of shards.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_twophase.cache.format import MANIFEST, fingerprint_hash
from llava_twophase.cache.header import Header
from llava_twophase.cache.local import TOO_MANY_FILES, LocalStorage, ShardFile
from llava_twophase.cache.manifest import ShardEntry
from llava_twophase.cache.shard import Shard
from llava_twophase.cache.storage import Storage
from llava_twophase.errors import UserError

_KEPT_FILES = 64


class ShardFiles:
    """The shards of a cache, opened when they are read. Threads and forked processes may share an instance.

    Args:
        storage: Where the cache is.
        entries: The shards as the manifest lists them.
    """

    def __init__(self, storage: Storage, entries: Sequence[ShardEntry]) -> None:
        self._storage, self._entries = storage, entries
        self._files: OrderedDict[int, Shard] = OrderedDict()
        self._kept = _files_to_keep()
        self._owner = os.getpid()

    def will_open_all(self, headers_only: bool = False) -> None:
        """Prepare to open all shards, in the order of the manifest, for their headers and keys."""
        self._storage.will_open([entry.file for entry in self._entries], headers_only)

    def header(self, shard: int, fingerprint: str) -> Header:
        """Read a shard's header and compare it with the manifest.

        Args:
            shard: The shard's position in the manifest.
            fingerprint: SHA-256 of the manifest's fingerprint.

        Raises:
            UserError: The shard is missing, truncated, of another format version, or differs from the manifest.
        """
        header = self.open(shard).header()
        compare_with_entry(header, self._entries[shard], fingerprint, f"{self._storage}/{MANIFEST}")
        return header

    def open(self, shard: int) -> Shard:
        """Return a shard, open.

        Raises:
            UserError: It cannot be opened.
        """
        if self._owner != os.getpid():
            # This is a forked child.
            self._files, self._owner = OrderedDict(), os.getpid()
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = self._open(self._entries[shard].file)
            with suppress(KeyError):  # another thread may have emptied it
                while len(self._files) > self._kept:
                    self._files.popitem(last=False)
        else:
            with suppress(KeyError):  # another thread may have dropped it; it stays open while it is referenced here
                self._files.move_to_end(shard)
        return file

    def name(self, shard: int) -> str:
        """Return a shard's file name."""
        return self._entries[shard].file

    def read_together(self, pieces: Sequence[tuple[int, memoryview, int]]) -> None:
        """Read several pieces: a shard, the memory for its bytes, and their offset; in any order, or concurrently.

        Raises:
            UserError: One cannot be read.
        """
        self._storage.read_together([(self.open(shard), view, offset) for shard, view, offset in pieces])

    def close(self) -> None:
        """Close files; the next read opens them again."""
        self._files.clear()

    def _open(self, name: str) -> Shard:
        try:
            return self._storage.open_shard(name)
        except UserError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in TOO_MANY_FILES:
                raise
        # The rest of the process needed more files than expected: give up ours.
        self._kept = max(1, self._kept // 2)
        self._files.clear()
        return self._storage.open_shard(name)


def read_header(path: Path) -> Header:
    """Read a shard's header and check that the file has the length that it states.

    Raises:
        UserError: The shard is missing, truncated, damaged, or of another format version.
    """
    return ShardFile(path).header()


def check_shard(cache: Path, entry: ShardEntry, fingerprint: dict[str, Any]) -> Header:
    """Read a shard's header and compare it with the manifest.

    Args:
        cache: The cache's directory.
        entry: The shard as the manifest lists it.
        fingerprint: The manifest's fingerprint.

    Raises:
        UserError: The shard is missing, truncated, of another format version, or differs from the manifest.
    """
    return ShardFiles(LocalStorage(cache), [entry]).header(0, fingerprint_hash(fingerprint))


def compare_with_entry(header: Header, entry: ShardEntry, fingerprint: str, manifest: str) -> None:
    """Compare a shard's header with the manifest.

    Args:
        header: The header.
        entry: The shard as the manifest lists it.
        fingerprint: SHA-256 of the manifest's fingerprint.
        manifest: What to call the manifest in errors.

    Raises:
        UserError: They differ.
    """
    found = (header.rows, header.file_bytes, header.xxh3_128)
    if found != (entry.rows, entry.file_bytes, entry.xxh3_128):
        raise UserError(f"{entry.file} is not the shard that {manifest} lists: found {found}, listed {entry}")
    if header.fingerprint != fingerprint:
        raise UserError(f"{entry.file} has another fingerprint than {manifest}; it may belong to another cache")


def _files_to_keep() -> int:
    # A quarter of what the process may open: data loaders, libraries and other caches need files too.
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _KEPT_FILES if limit == resource.RLIM_INFINITY else max(1, min(_KEPT_FILES, limit // 4))
