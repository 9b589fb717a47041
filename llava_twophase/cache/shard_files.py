"""Read headers, datasets and rows of sealed shards. No other module reads the bytes of a shard.

Reads are positioned: nothing is locked, threads share files, and a forked process opens its own. The number of files
that are kept open does not depend on the number of shards.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llava_twophase.cache.format import MANIFEST, SHARDS, USER_BLOCK, fingerprint_hash
from llava_twophase.cache.header import Header, StoredDataset, decode_header
from llava_twophase.cache.manifest import ShardEntry
from llava_twophase.errors import UserError

_KEPT_FILES = 64
_LFS_POINTER = b"version https://git-lfs"
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


class ShardFile:
    """One shard, open for reading; closed when the last reference to it is dropped.

    Args:
        path: The file.
        cache: The cache's directory. If given, a link that leads out of it is refused.

    Attributes:
        path: The file.
        size: Its length in bytes.

    Raises:
        UserError: It cannot be opened, or is not a regular file.
    """

    # Closed by reference counting: if the cache of open files closed it, a read of another thread could hit a different
    # file that was given the same descriptor.

    def __init__(self, path: str | Path, cache: Path | None = None) -> None:
        self.path, self._descriptor = str(path), -1
        try:
            self._descriptor = _open(self.path, cache)
            status = os.fstat(self._descriptor)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{self.path} cannot be read: it is not a regular file")
        self.size = status.st_size

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def header_block(self) -> bytes:
        """Read the user block; it is shorter than ``USER_BLOCK`` bytes if the file is.

        Raises:
            UserError: It cannot be read, or the file is a Git LFS pointer.
        """
        try:
            block = os.pread(self._descriptor, USER_BLOCK, 0)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if block.startswith(_LFS_POINTER):
            raise UserError(f"{self.path} is a Git LFS pointer; git lfs pull downloads the shard")
        return block

    def header(self) -> Header:
        """Read the header and check that the file has the length that it states.

        Raises:
            UserError: The file is not a shard of this format version, is damaged, or has another length.
        """
        header = decode_header(self.header_block(), self.path)
        if self.size != header.file_bytes:
            raise UserError(f"{self.path} is truncated or too long: {self.size} bytes, expected {header.file_bytes}")
        return header

    def read_into(self, view: memoryview, offset: int) -> None:
        """Read bytes into the caller's memory.

        Raises:
            UserError: They cannot be read, or the file ends before them.
        """
        while view:
            try:
                count = os.preadv(self._descriptor, (view,), offset)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if count == 0:
                raise UserError(f"{self.path} is truncated; delete it and extract it again")
            view, offset = view[count:], offset + count

    def read_bytes(self, data: StoredDataset) -> bytes:
        """Read the bytes of a dataset."""
        return self.read_dataset(data).tobytes()

    def read_dataset(self, data: StoredDataset) -> np.ndarray:
        """Read a dataset into a new array."""
        raw = np.empty(data.nbytes, np.uint8)
        self.read_into(memoryview(raw), data.offset)
        return raw.view(data.numpy_dtype).reshape(data.shape)

    def read_rows_into(self, header: Header, first: int, rows: np.ndarray) -> None:
        """Read consecutive rows.

        Args:
            header: The shard's header.
            first: The first row.
            rows: Memory for the stored rows, ``uint8 [B, row_bytes]``, C-contiguous.
        """
        begin = 0
        for part in header.row_parts:
            is_only_part = part.row_bytes == rows.shape[1]
            raw = rows if is_only_part else np.empty((len(rows), part.row_bytes), np.uint8)
            self.read_into(memoryview(raw.reshape(-1)), part.offset + first * part.row_bytes)
            if not is_only_part:
                rows[:, begin : begin + part.row_bytes] = raw
            begin += part.row_bytes

    def will_need(self, offset: int, count: int) -> None:
        """Ask the system to start reading bytes; systems that cannot do this ignore it."""
        with suppress(OSError):
            os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_WILLNEED)

    def checksum_around(self, header: Header) -> str:
        """Return what the header's ``xxh3_128`` must be, from the bytes of the file."""
        return checksum_around(self._descriptor, header)


class ShardFiles:
    """The shards of a cache, opened when they are read. Threads and forked processes may share an instance.

    Args:
        cache: The cache's directory.
        entries: The shards as the manifest lists them.
    """

    def __init__(self, cache: Path, entries: Sequence[ShardEntry]) -> None:
        self._cache, self._entries = cache, entries
        self._folder = os.path.join(cache, SHARDS)
        self._files: OrderedDict[int, ShardFile] = OrderedDict()
        self._kept = _files_to_keep()
        self._owner = os.getpid()

    def header(self, shard: int, fingerprint: str) -> Header:
        """Read a shard's header and compare it with the manifest.

        Args:
            shard: The shard's position in the manifest.
            fingerprint: SHA-256 of the manifest's fingerprint.

        Raises:
            UserError: The shard is missing, truncated, of another format version, or differs from the manifest.
        """
        header, entry = self.open(shard).header(), self._entries[shard]
        found = (header.rows, header.file_bytes, header.xxh3_128)
        if found != (entry.rows, entry.file_bytes, entry.xxh3_128):
            raise UserError(
                f"{entry.file} is not the shard that {self._cache / MANIFEST} lists: found {found}, listed {entry}"
            )
        if header.fingerprint != fingerprint:
            raise UserError(
                f"{entry.file} has another fingerprint than {self._cache / MANIFEST}; it may belong to another cache"
            )
        return header

    def open(self, shard: int) -> ShardFile:
        """Return a shard's file, open.

        Raises:
            UserError: It cannot be opened.
        """
        if self._owner != os.getpid():
            # This is a forked child.
            self._files, self._owner = OrderedDict(), os.getpid()
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = self._open(os.path.join(self._folder, self._entries[shard].file))
            with suppress(KeyError):  # another thread may have emptied it
                while len(self._files) > self._kept:
                    self._files.popitem(last=False)
        else:
            with suppress(KeyError):  # another thread may have dropped it; it stays open while it is referenced here
                self._files.move_to_end(shard)
        return file

    def close(self) -> None:
        """Close files; the next read opens them again."""
        self._files.clear()

    def _open(self, path: str) -> ShardFile:
        try:
            return ShardFile(path, self._cache)
        except UserError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _TOO_MANY_FILES:
                raise
        # The rest of the process needed more files than expected: give up ours.
        self._kept = max(1, self._kept // 2)
        self._files.clear()
        return ShardFile(path, self._cache)


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
    return ShardFiles(cache, [entry]).header(0, fingerprint_hash(fingerprint))


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


def _open(path: str, cache: Path | None) -> int:
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | (os.O_NOFOLLOW if cache else 0))
    except OSError as error:
        if error.errno != errno.ELOOP or not cache:
            raise
    # os.path.realpath, unlike Path.resolve, accepts a link that leads to itself; opening it below then fails.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(cache)):
        raise UserError(f"{path} is a link that leads out of the cache; put the file itself there")
    return os.open(path, flags)


def _files_to_keep() -> int:
    # A quarter of what the process may open: data loaders, libraries and other caches need files too.
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _KEPT_FILES if limit == resource.RLIM_INFINITY else max(1, min(_KEPT_FILES, limit // 4))


def _unreadable(path: str, error: OSError) -> UserError:
    advice = "; raise the limit (ulimit -n 1024)" if error.errno in _TOO_MANY_FILES else ""
    return UserError(f"{path} cannot be read: {error.strerror or error}{advice}")
