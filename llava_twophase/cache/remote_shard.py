"""A shard at a URL: its first bytes are kept, and the others are requested from its storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_twophase.cache.format import SHARDS
from llava_twophase.cache.shard import Shard
from llava_twophase.errors import UserError

if TYPE_CHECKING:
    from llava_twophase.cache.remote import RemoteStorage


class RemoteShard(Shard):
    """A shard at a URL.

    Args:
        storage: The cache.
        name: The shard's file name.
        size: Its length in bytes.
        version: Its ETag, or what the protocol has instead.
        head: Its first bytes, which need no further request.
    """

    def __init__(self, storage: RemoteStorage, name: str, size: int, version: str, head: bytes = b"") -> None:
        self.path, self.size = f"{storage}/{SHARDS}/{name}", size
        self._storage, self._name = storage, name
        self._version, self._head = version, head

    def read_into(self, view: memoryview, offset: int) -> None:
        """Read bytes into the caller's memory.

        Raises:
            UserError: They cannot be read, or the file ends before them.
        """
        if offset + len(view) <= len(self._head):
            view[:] = self._head[offset : offset + len(view)]
        elif offset + len(view) > self.size:
            raise UserError(f"{self.path} is truncated: {self.size} bytes; copy it again")
        else:
            self._storage.read_together([(self, view, offset)])

    def changed(self) -> str:
        """Return how the file on the server differs from when it was opened; empty if it does not."""
        self._storage.forget_listings()
        size, version = self._storage.version_of(self._name)
        found = [
            f"{what} {before}, now {now}"
            for what, before, now in (("size", self.size, size), ("version", self._version, version))
            if before != now
        ]
        return "; ".join(found)
