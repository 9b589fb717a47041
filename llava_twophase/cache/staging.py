"""``Stage``: copies of remote shards in a folder of this machine, shared by processes, within a limit of disk space.

A copy has the name of its shard's checksum, so that it belongs to the content and not to a URL. It is written under
another name, compared with every checksum, synced and renamed: it is complete or absent. The file that is being
written is locked, so that another process can tell it from one that a killed process left. The least recently read
copies are removed first. A process may read a copy that another one removes: the file exists until it is closed.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from llava_twophase.cache.format import fingerprint_hash
from llava_twophase.cache.local import ShardFile
from llava_twophase.cache.manifest import Manifest, ShardEntry
from llava_twophase.cache.shard import Shard
from llava_twophase.cache.shard_files import compare_with_entry
from llava_twophase.cache.shard_writer import pwrite_all
from llava_twophase.errors import UserError
from llava_twophase.files import require_writable, sync_folder

_COPY, _PART = ".h5", ".h5.part"
_LOCK = "stage.lock"
_BLOCK = 32 << 20
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True)
class Stage:
    """A folder with copies of remote shards. Processes that give the same folder share the copies.

    Args:
        folder: The folder; it is created. ``/dev/shm/...`` keeps the copies in memory.
        limit: Most bytes of all copies together.
    """

    folder: Path
    limit: int

    def prepare(self) -> None:
        """Create the folder, and check that it can be written.

        Raises:
            UserError: It cannot.
        """
        require_writable(self.folder, "--stage_dir")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise UserError(f"--stage_dir {self.folder} cannot be written: {error.strerror or error}") from None

    def open(self, entry: ShardEntry) -> ShardFile | None:
        """Open the copy of a shard and mark it as used; None if there is none."""
        path = self._path(entry, _COPY)
        try:
            copy = ShardFile(path)
            os.utime(path)
        except (UserError, FileNotFoundError):
            return None
        return copy if copy.size == entry.file_bytes else None

    def has(self, entry: ShardEntry) -> bool:
        """Return whether there is a copy of a shard."""
        return self._path(entry, _COPY).exists()

    def is_in_progress(self, entry: ShardEntry) -> bool:
        """Return whether a process is copying a shard, or was killed while it did."""
        return self._path(entry, _PART).exists()

    def remove(self, entry: ShardEntry) -> None:
        """Remove the copy of a shard."""
        self._path(entry, _COPY).unlink(missing_ok=True)

    def add(self, shard: Shard, entry: ShardEntry, manifest: Manifest, kept: Callable[[], Collection[str]]) -> bool:
        """Copy a shard, unless another process does.

        Args:
            shard: The shard to read.
            entry: The shard as the manifest lists it.
            manifest: The manifest.
            kept: Returns the checksums of shards whose copies must not be removed to make room.

        Returns:
            Whether there is a copy now: False if there is no room, or if another process is writing it.

        Raises:
            OSError: The disk is full, or the copy cannot be written.
            UserError: The shard cannot be read, or does not match its checksums.
        """
        writer = self._begin(entry, kept)
        if writer is None:
            return self.has(entry)
        _copy_and_rename(shard, writer, self._path(entry, _PART), self._path(entry, _COPY), entry, manifest)
        return True

    def _begin(self, entry: ShardEntry, kept: Callable[[], Collection[str]]) -> int | None:
        # Reserve the space of a copy and return its locked file; None if there is nothing to do or no room.
        part = self._path(entry, _PART)
        with self._locked():
            self._remove_abandoned()
            if self.has(entry) or part.exists() or not self._make_room(entry.file_bytes, kept()):
                return None
            writer = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                _lock(writer)
                _reserve(writer, entry.file_bytes)
            except BaseException:
                part.unlink(missing_ok=True)
                os.close(writer)
                raise
            return writer

    def _make_room(self, size: int, kept: Collection[str]) -> bool:
        used = sum(path.stat().st_size for path in self.folder.glob(f"*{_PART}"))
        copies = [(path.stat(), path) for path in self.folder.glob(f"*{_COPY}")]
        used += sum(status.st_size for status, _ in copies)
        removable = sorted((item for item in copies if item[1].stem not in kept), key=lambda item: item[0].st_mtime_ns)
        if used + size - sum(status.st_size for status, _ in removable) > self.limit:
            return False
        for status, path in removable:
            if used + size <= self.limit:
                break
            path.unlink(missing_ok=True)
            used -= status.st_size
        return True

    def _remove_abandoned(self) -> None:
        # What a killed process left: nobody has locked it.
        for part in self.folder.glob(f"*{_PART}"):
            with suppress(FileNotFoundError):
                descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if _lock(descriptor):
                        part.unlink()
                finally:
                    os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _path(self, entry: ShardEntry, suffix: str) -> Path:
        return self.folder / f"{entry.xxh3_128}{suffix}"


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _reserve(descriptor: int, size: int) -> None:
    # A full disk is found before anything is copied.
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(descriptor, size)


def copy_shard(shard: Shard, path: Path, entry: ShardEntry, manifest: Manifest) -> None:
    """Copy a shard to a file, compare the copy with every checksum, and rename it to its name.

    Args:
        shard: The shard to read.
        path: The file; until the copy is complete, it has the suffix ``.part``.
        entry: The shard as the manifest lists it.
        manifest: The manifest.

    Raises:
        OSError: The disk is full, or the file cannot be written.
        UserError: The shard cannot be read, or does not match its checksums.
    """
    part = path.with_name(f"{path.name}.part")
    writer = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    _copy_and_rename(shard, writer, part, path, entry, manifest)


def _copy_and_rename(shard: Shard, writer: int, part: Path, path: Path, entry: ShardEntry, manifest: Manifest) -> None:
    try:
        _copy(shard, writer, entry.file_bytes)
        _check(ShardFile(part), entry, manifest)
        os.fsync(writer)
        part.rename(path)
        sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(writer)


def _copy(shard: Shard, descriptor: int, size: int) -> None:
    buffer = memoryview(bytearray(min(_BLOCK, size)))
    for offset in range(0, size, _BLOCK):
        part = buffer[: min(_BLOCK, size - offset)]
        shard.read_into(part, offset)
        pwrite_all(descriptor, np.frombuffer(part, np.uint8), offset)


def _check(copy: Shard, entry: ShardEntry, manifest: Manifest) -> None:
    # Together, these checksums cover every bit of the file.
    header = copy.header()
    compare_with_entry(header, entry, fingerprint_hash(manifest.fingerprint), "the manifest")
    checksums = copy.read_dataset(header.datasets["row_xxh3"])
    row = np.empty((1, sum(part.row_bytes for part in header.row_parts)), np.uint8)
    intact = copy.checksum_around(header) == header.xxh3_128 and header.to_bytes() == copy.header_block()
    for number in range(header.rows):
        copy.read_rows_into(header, number, row)
        intact = intact and xxhash.xxh3_64_intdigest(row) == int(checksums[number])
    if not intact:
        raise UserError(f"{entry.file} does not match its checksums after it was copied")
