"""Read stored rows into a caller's memory, and compare each with its checksum.

From a local disk, the rows of a call are read one after another; callers use threads. From a URL, they are requested
together.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import xxhash

from llava_twophase.cache.header import Header
from llava_twophase.cache.shard_files import ShardFiles
from llava_twophase.cache.storage import Storage
from llava_twophase.errors import UserError

_REPEATS = 4
_PAUSE = 0.5  # seconds, from the second repetition on

Place = tuple[int, int]
"""A shard's position in the manifest, and a row of it."""


class StoredRows:
    """The rows of a cache's shards. Threads may share an instance.

    Args:
        storage: Where the cache is.
        files: Its shards.
        headers: Their headers.
        starts: The first row of each shard, and the number of rows.
        checksums: ``uint64 [rows]``, the checksums of all rows. Without them, a shard's are read with its first row.
    """

    def __init__(
        self,
        storage: Storage,
        files: ShardFiles,
        headers: Sequence[Header],
        starts: np.ndarray,
        checksums: np.ndarray | None,
    ) -> None:
        self._storage, self._files = storage, files
        self._headers = headers
        self._starts, self._checksums = starts, checksums
        self._read_checksums: dict[int, np.ndarray] = {}
        # For each part of a stored row: where the part begins in each shard, and its size.
        self._parts = [
            ([header.row_parts[part].offset for header in headers], data.row_bytes)
            for part, data in enumerate(headers[0].row_parts)
        ]

    def read_into(self, places: Iterable[Place], target: np.ndarray) -> None:
        """Read rows.

        Args:
            places: Where the rows are.
            target: Memory for them, ``uint8 [B, row_bytes]``, each row contiguous.

        Raises:
            UserError: A shard cannot be read or is truncated, or a row does not match its checksum.
        """
        if self._storage.folder is None:
            self._request(list(places), target)
            return
        for position, (shard, row) in enumerate(places):
            stored = memoryview(target[position])
            file, begin = self._files.open(shard), 0
            for offsets, count in self._parts:
                file.read_into(stored[begin : begin + count], offsets[shard] + row * count)
                begin += count
            # Now the row is in the processor's cache. Hashing releases the GIL.
            if xxhash.xxh3_64_intdigest(stored) != self._checksums_of(shard)[row]:
                raise self._damaged(shard, row)

    def will_need(self, places: Iterable[Place]) -> None:
        """Ask the system to fetch rows in the background, because they will be read soon."""
        for shard, row in places:
            file = self._files.open(shard)
            for offsets, count in self._parts:
                file.will_need(offsets[shard] + row * count, count)

    def _request(self, places: list[Place], target: np.ndarray) -> None:
        # A row that does not match is requested again: something between the server and here may have changed it.
        wanted = list(range(len(places)))
        for repeat in range(_REPEATS):
            time.sleep(_PAUSE * max(0, repeat - 1))
            pieces = (self._pieces(*places[position], memoryview(target[position])) for position in wanted)
            self._files.read_together(list(chain.from_iterable(pieces)))
            wanted = [position for position in wanted if not self._is_intact(*places[position], target[position])]
            if not wanted:
                return
            for position in wanted:
                self._files.open(places[position][0]).distrust()
        raise self._damaged(*places[wanted[0]])

    def _pieces(self, shard: int, row: int, stored: memoryview) -> Iterable[tuple[int, memoryview, int]]:
        begin = 0
        for offsets, count in self._parts:
            yield shard, stored[begin : begin + count], offsets[shard] + row * count
            begin += count

    def _is_intact(self, shard: int, row: int, stored: np.ndarray) -> bool:
        return bool(xxhash.xxh3_64_intdigest(stored) == self._checksums_of(shard)[row])

    def _checksums_of(self, shard: int) -> np.ndarray:
        if self._checksums is not None:
            return self._checksums[self._starts[shard] : self._starts[shard + 1]]
        # Read once for each shard: a read for each row would take another seek on a disk.
        if shard not in self._read_checksums:
            file, data = self._files.open(shard), self._headers[shard].datasets["row_xxh3"]
            self._read_checksums[shard] = file.read_dataset(data)
        return self._read_checksums[shard]

    def _damaged(self, shard: int, row: int) -> UserError:
        file = self._files.open(shard)
        changed = file.changed()
        if changed:
            advice = "run the same command again; training resumes from its last checkpoint"
            return UserError(f"{file.path} changed on the server while it was in use ({changed}); {advice}")
        name = file.read_dataset(self._headers[shard].datasets["image_key"])[row]
        return UserError(
            f"the features of {bytes(name).decode('utf-8', 'replace')!r} do not match their checksum: bytes of "
            f"{self._files.name(shard)} changed since they were written; run: llava-inspect-cache verify "
            f"{self._storage}"
        )
