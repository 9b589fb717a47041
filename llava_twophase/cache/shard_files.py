"""Positioned reads of sealed shards, and their headers held against the manifest; knows nothing of keys or HDF5.

Nothing is locked, no handle lives across a fork, and few files are open however many shards there are.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from llava_twophase.cache.format import (
    MANIFEST,
    SHARDS,
    USER_BLOCK,
    Header,
    StoredDataset,
    decode_header,
    fingerprint_hash,
)
from llava_twophase.cache.manifest import ShardEntry
from llava_twophase.errors import UserError

_OPEN_FILES = 64


class ShardFiles:
    """The shards of a cache, opened when they are read; safe to share between threads and over a fork.

    Args:
        cache: The cache's directory.
        entries: The shards as the manifest lists them.
    """

    def __init__(self, cache: Path, entries: Sequence[ShardEntry]) -> None:
        self._cache, self._entries = cache, entries
        self._folder = os.path.join(cache, SHARDS)
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._owner = os.getpid()

    def header(self, shard: int, fingerprint: str) -> Header:
        """Read a shard's header and hold it against the manifest.

        Args:
            shard: Its place in the manifest.
            fingerprint: SHA-256 of the manifest's fingerprint.

        Raises:
            UserError: The shard is missing, truncated, of another schema, or disagrees with the manifest.
        """
        return _agreeing(self._open(shard).header(), self._entries[shard], fingerprint, self._cache)

    def read_into(self, shard: int, view: memoryview, offset: int) -> None:
        """Read bytes of a shard into the caller's memory.

        Raises:
            UserError: The shard cannot be read, or is shorter than it says.
        """
        file = self._open(shard)
        while view:
            count = os.preadv(file.descriptor, (view,), offset)
            if count == 0:
                raise UserError(f"{file.path} is truncated; delete it and extract it again")
            view, offset = view[count:], offset + count

    def will_need(self, shard: int, offset: int, count: int) -> None:
        """Let the system start reading bytes of a shard; where it cannot, nothing happens."""
        file = self._open(shard)
        with suppress(OSError):
            os.posix_fadvise(file.descriptor, offset, count, os.POSIX_FADV_WILLNEED)

    def read(self, shard: int, data: StoredDataset) -> bytes:
        """Read a dataset's bytes."""
        whole = os.pread(self._open(shard).descriptor, data.nbytes, data.offset)
        if len(whole) < data.nbytes:  # Linux reads 2 GB at most
            rest = bytearray(data.nbytes)
            self.read_into(shard, memoryview(rest), data.offset)
            return bytes(rest)
        return whole

    def close(self) -> None:
        """Close files; the next read opens them again."""
        self._files.clear()

    def _open(self, shard: int) -> _File:
        if self._owner != os.getpid():
            # A forked child opens its own.
            self._files, self._owner = OrderedDict(), os.getpid()
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = _File(os.path.join(self._folder, self._entries[shard].file), self._cache)
            with suppress(KeyError):  # another thread may just have emptied it
                while len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
        else:
            with suppress(KeyError):  # another thread may just have dropped it; it stays open while we hold it
                self._files.move_to_end(shard)
        return file


class _File:
    # Closes with its last reference: were it closed when dropped from the list, another thread's read could hit
    # whatever file was given the same descriptor.

    def __init__(self, path: str, cache: Path | None = None) -> None:
        self.path, self.descriptor = path, -1
        # Without O_NONBLOCK, opening a named pipe would wait for its writer for good.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            try:
                self.descriptor = os.open(path, flags | (os.O_NOFOLLOW if cache else 0))
            except OSError as error:
                if error.errno != errno.ELOOP or not cache:
                    raise
                if not Path(path).resolve().is_relative_to(cache.resolve()):
                    raise UserError(f"{path} is a link that leaves the cache's folder; put the file there") from None
                self.descriptor = os.open(path, flags)
            status = os.fstat(self.descriptor)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} cannot be read: it is not a regular file")
        self._size = status.st_size

    def header(self) -> Header:
        header = decode_header(os.pread(self.descriptor, USER_BLOCK, 0), self.path)
        if self._size != header.file_bytes:
            raise UserError(f"{self.path} is truncated or too long: {self._size} bytes, expected {header.file_bytes}")
        return header

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def check_shard(cache: Path, entry: ShardEntry, fingerprint: dict[str, Any]) -> Header:
    """Read a shard's header and hold it against the manifest.

    Args:
        cache: The cache's directory.
        entry: What the manifest says of the shard.
        fingerprint: The manifest's fingerprint.

    Returns:
        The header.

    Raises:
        UserError: The shard is missing, truncated, of another schema, or disagrees with the manifest.
    """
    return ShardFiles(cache, [entry]).header(0, fingerprint_hash(fingerprint))


def read_header(path: Path) -> Header:
    """Read a shard's header; the file must be as long as it says.

    Raises:
        UserError: The shard is missing, truncated, damaged, or of another schema.
    """
    return _File(str(path)).header()


def checksum_around(descriptor: int, header: Header) -> str:
    """Return the XXH3-128 (hex) of all bytes after the user block, except those of ``/features`` and ``/scale``."""
    digest = xxhash.xxh3_128()
    position = USER_BLOCK
    for part in sorted(header.row_parts, key=lambda data: data.offset):
        _hash_range(digest, descriptor, position, part.offset)
        position = part.offset + part.nbytes
    _hash_range(digest, descriptor, position, header.file_bytes)
    return digest.hexdigest()


def _hash_range(digest: xxhash.xxh3_128, descriptor: int, start: int, stop: int) -> None:
    for position in range(start, stop, 1 << 20):
        digest.update(os.pread(descriptor, min(1 << 20, stop - position), position))


def _agreeing(header: Header, entry: ShardEntry, fingerprint: str, cache: Path) -> Header:
    found = (header.rows, header.file_bytes, header.xxh3_128)
    if found != (entry.rows, entry.file_bytes, entry.xxh3_128):
        raise UserError(f"{entry.file} is not the shard that {cache / MANIFEST} lists: {found}, listed {entry}")
    if header.fingerprint != fingerprint:
        raise UserError(f"{entry.file} has another fingerprint than {cache / MANIFEST}: another cache's shard?")
    return header
