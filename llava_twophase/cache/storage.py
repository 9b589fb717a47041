"""Where the files of a cache are: a folder on this machine, or a URL that fsspec reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from llava_twophase.cache.local import LocalStorage
from llava_twophase.cache.shard import Shard

if TYPE_CHECKING:
    from llava_twophase.cache.manifest import Manifest
    from llava_twophase.cache.staging import Stage

Piece = tuple[Shard, memoryview, int]
"""Memory for some bytes of a shard, and their offset there."""


class Storage(Protocol):
    """Reads the files of one cache. Threads and forked processes may share it. ``str()`` is what the user gave."""

    @property
    def folder(self) -> Path | None:
        """The folder on this machine; None for a URL."""

    def read_file(self, name: str) -> bytes | None:
        """Return the content of a small file, None if there is no such file.

        Raises:
            UserError: It cannot be read.
        """

    def without(self, name: str) -> str:
        """Return what this storage is, given that it does not have a file."""

    def open_shard(self, name: str) -> Shard:
        """Open a shard.

        Raises:
            UserError: It cannot be opened.
        """

    def read_together(self, pieces: Sequence[Piece]) -> None:
        """Read several pieces, concurrently where that is faster.

        Raises:
            UserError: One cannot be read.
        """

    def close(self) -> None:
        """Give up what other threads are reading; later reads work again."""

    def will_open(self, names: Sequence[str], headers_only: bool = False) -> None:
        """Prepare to open shards one after another, in this order, for their headers and keys."""


@runtime_checkable
class Staging(Protocol):
    """A storage that keeps copies of shards on this machine."""

    def stage_ahead(self, shards: np.ndarray) -> None:
        """Copy shards in the background, given the shard of each row in the order of use."""

    def advance(self, count: int) -> None:
        """Record that so many rows of that order have been used."""


def is_url(path: str | Path) -> bool:
    """Return whether a cache is at a URL, such as ``s3://bucket/cache``."""
    return isinstance(path, str) and "://" in path


def staged_storage(storage: Storage, stage: Stage, manifest: Manifest) -> Storage:
    """Return a remote cache whose shards are copied to a stage.

    Raises:
        UserError: The stage cannot be written, or a shard is larger than its limit.
    """
    from llava_twophase.cache.staged import StagedStorage

    return StagedStorage(storage, stage, manifest)


def open_storage(path: str | Path | Storage) -> Storage:
    """Return the storage of a cache, by its folder or URL.

    Raises:
        UserError: No installed package reads the URL.
    """
    if not isinstance(path, (str, Path)):
        return path
    if not is_url(path):
        return LocalStorage(Path(path))
    from llava_twophase.cache.remote import RemoteStorage

    return RemoteStorage(str(path))
