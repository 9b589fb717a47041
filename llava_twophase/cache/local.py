"""A cache's folder on this machine, and its sealed shards as files.

Reads are positioned: nothing is locked, and threads share files.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llava_twophase.cache.format import SHARDS
from llava_twophase.cache.shard import Shard
from llava_twophase.errors import UserError

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


class LocalStorage:
    """The folder of a cache.

    Args:
        folder: The folder; it need not exist.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        """Return the folder."""
        return str(self.folder)

    def read_file(self, name: str) -> bytes | None:
        """Return the content of a small file, None if there is no such file.

        Raises:
            UserError: It cannot be read.
        """
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None

    def without(self, name: str) -> str:
        """Return what this folder is, given that it does not have a file."""
        if self.folder.is_dir():
            return f"has no {name}"
        if self.folder.exists():
            return "is not a folder"
        # pathlib joins the two slashes of a URL, and a user may have typed one.
        protocol, slash, rest = str(self.folder).partition(":/")
        meant = f"; did you mean {protocol}://{rest}?" if slash and protocol.isalnum() and len(protocol) > 1 else ""
        return f"does not exist{meant}"

    def open_shard(self, name: str) -> ShardFile:
        """Open a shard.

        Raises:
            UserError: It cannot be opened, or is not a regular file within the folder.
        """
        return ShardFile(os.path.join(self.folder, SHARDS, name), self.folder)

    def read_together(self, pieces: Sequence[tuple[Shard, memoryview, int]]) -> None:
        """Read several pieces, one after another.

        Raises:
            UserError: One cannot be read.
        """
        for shard, view, offset in pieces:
            shard.read_into(view, offset)

    def close(self) -> None:
        """Do nothing: reads of a file end by themselves."""

    def will_open(self, names: Sequence[str], headers_only: bool = False) -> None:
        """Do nothing: files on this machine are opened fast."""


class ShardFile(Shard):
    """A shard on this machine, open for reading; closed when the last reference to it is dropped.

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

    def will_need(self, offset: int, count: int) -> None:
        """Ask the system to start reading bytes; systems that cannot do this ignore it."""
        with suppress(OSError):
            os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_WILLNEED)


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


def _unreadable(path: str, error: OSError) -> UserError:
    advice = "; raise the limit (ulimit -n 1024)" if error.errno in TOO_MANY_FILES else ""
    return UserError(f"{path} cannot be read: {error.strerror or error}{advice}")
