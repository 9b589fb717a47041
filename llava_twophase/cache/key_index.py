"""Find rows by image key in a sorted array of hashes, without a Python object for each image.

20 million keys of 23 bytes take 8 bytes per key for the hashes and 23 for the keys themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import xxhash

from llava_twophase.errors import UserError

_CHUNK = 1 << 20


class KeyIndex:
    """Finds rows by image key. Forked processes share its memory, because nothing in it is written to.

    Args:
        names: For each shard, the bytes of its keys, each padded with zeros to the shard's width.
        widths: For each shard, the bytes of a padded key.
        hashes: The XXH3-64 of each key, as uint64. The array is overwritten.

    Attributes:
        starts: int64, the first row of each shard, and the number of rows.

    Raises:
        UserError: A key occurs twice.
    """

    def __init__(self, names: Sequence[bytes], widths: Sequence[int], hashes: bytearray) -> None:
        self._names, self._widths = names, np.array(widths)
        self.starts = np.cumsum([0, *(len(part) // width for part, width in zip(names, widths, strict=True))])
        # An entry has the hash in its high bits and the row in its low bits: sorting one array is twice as fast as
        # argsort and takes half the memory. Keys with equal high bits are compared by name.
        self._entries = np.frombuffer(hashes, np.uint64)
        self._mask = np.uint64((1 << max(1, (len(self) - 1).bit_length())) - 1)
        for start in range(0, len(self), _CHUNK):
            part = self._entries[start : start + _CHUNK]
            part &= ~self._mask
            part |= np.arange(start, start + len(part), dtype=np.uint64)
        self._entries.sort()
        self._refuse_duplicates()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._entries)

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Find rows.

        Args:
            keys: Image keys.

        Returns:
            ``int64 [len(keys)]``, -1 for unknown keys.
        """
        names = [key.encode("utf-8", "surrogatepass") for key in keys]
        wanted = np.fromiter(map(xxhash.xxh3_64_intdigest, names), np.uint64, len(names)) & ~self._mask
        first = np.searchsorted(self._entries, wanted)
        # Nearly every key has a single candidate; the loop handles the others.
        candidates = (self._entries[np.minimum(first, len(self) - 1)] & self._mask).astype(np.int64)
        for position, (name, stored) in enumerate(zip(names, self._stored(candidates), strict=True)):
            if stored != name:
                candidates[position] = self._find_from(name, wanted[position], int(first[position]) + 1)
        return candidates

    def names(self) -> Iterator[bytes]:
        """Iterate over image keys in row order."""
        for part, width in zip(self._names, self._widths.tolist(), strict=True):
            for begin in range(0, len(part), width):
                yield part[begin : begin + width].rstrip(b"\0")

    def shards(self, rows: np.ndarray) -> np.ndarray:
        """Return the shard of each row, ``int64`` like ``rows``."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def _refuse_duplicates(self) -> None:
        groups: dict[int, set[int]] = defaultdict(set)
        for start in range(0, len(self), _CHUNK):
            part = self._entries[start : start + _CHUNK + 1]
            for position in np.flatnonzero((part[1:] ^ part[:-1]) <= self._mask).tolist():
                prefix = int(part[position] & ~self._mask)
                groups[prefix].update(int(entry & self._mask) for entry in part[position : position + 2])
        for rows in groups.values():
            for name, other in pairwise(sorted(self._stored(np.array(list(rows))))):
                if name == other:
                    key = name.decode("utf-8", "replace")
                    raise UserError(f"image key {key!r} is listed twice in the feature cache")

    def _find_from(self, name: bytes, wanted: np.uint64, position: int) -> int:
        while position < len(self) and self._entries[position] & ~self._mask == wanted:
            row = int(self._entries[position] & self._mask)
            if next(self._stored(np.array([row]))) == name:
                return row
            position += 1
        return -1

    def _stored(self, rows: np.ndarray) -> Iterator[bytes]:
        # The keys of rows.
        shards = self.shards(rows)
        widths = self._widths[shards]
        begins = (rows - self.starts[shards]) * widths
        for shard, begin, width in zip(shards.tolist(), begins.tolist(), widths.tolist(), strict=True):
            yield self._names[shard][begin : begin + width].rstrip(b"\0")
