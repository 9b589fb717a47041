"""Image keys to rows by a sorted array of hashes: no Python object for each image; knows nothing of files.

With 20 million keys of 23 bytes it takes 8 bytes a key for the hashes and 23 for the keys themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

_CHUNK = 1 << 20


class KeyIndex:
    """Finds rows by image key; shared between processes by fork, as nothing in it is written to.

    Args:
        names: ``uint8``, the keys of all shards, null-padded to their shard's width, one behind the other.
        hashes: ``uint64 [rows]``, the XXH3-64 of each key; overwritten.
        rows: How many rows each shard has.
        widths: Bytes of a key in each shard.
    """

    def __init__(self, names: np.ndarray, hashes: np.ndarray, rows: Sequence[int], widths: Sequence[int]) -> None:
        self._names = memoryview(names)
        self.starts = np.cumsum([0, *rows])
        self._widths = np.array(widths)
        self._name_starts = np.cumsum([0, *(count * width for count, width in zip(rows, widths, strict=True))])
        # The hash's high bits over the row's number: sorting one array is twice as fast as argsort, and half as large.
        # Keys whose high bits are equal are told apart by their names.
        self._mask = np.uint64((1 << max(1, (len(hashes) - 1).bit_length())) - 1)
        for start in range(0, len(hashes), _CHUNK):
            part = hashes[start : start + _CHUNK]
            part &= ~self._mask
            part |= np.arange(start, start + len(part), dtype=np.uint64)
        hashes.sort()
        self._entries = hashes

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._entries)

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Find rows.

        Args:
            keys: Image keys.

        Returns:
            ``int64 [len(keys)]``, -1 for a key that is not there.
        """
        names = [key.encode("utf-8", "surrogatepass") for key in keys]
        wanted = np.fromiter(map(xxhash.xxh3_64_intdigest, names), np.uint64, len(names)) & ~self._mask
        first = np.searchsorted(self._entries, wanted)
        # Nearly always there is one candidate; where there are more, the loop goes on to the next.
        candidates = (self._entries[np.minimum(first, len(self) - 1)] & self._mask).astype(np.int64)
        begins, ends = (positions.tolist() for positions in self._spans(candidates))
        rows = candidates.tolist()
        for position, name in enumerate(names):
            if bytes(self._names[begins[position] : ends[position]]).rstrip(b"\0") != name:
                rows[position] = self._find_further(name, wanted[position], int(first[position]) + 1)
        return np.array(rows, np.int64)

    def names(self) -> Iterator[bytes]:
        """Iterate over image keys in row order."""
        for shard, width in enumerate(self._widths.tolist()):
            for begin in range(int(self._name_starts[shard]), int(self._name_starts[shard + 1]), width):
                yield bytes(self._names[begin : begin + width]).rstrip(b"\0")

    def twin(self) -> bytes | None:
        """Return a key that stands twice, or None."""
        groups: dict[int, list[int]] = defaultdict(list)
        for start in range(0, len(self), _CHUNK):
            part = self._entries[start : start + _CHUNK + 1]
            for position in np.flatnonzero((part[1:] ^ part[:-1]) <= self._mask).tolist():
                prefix = int(part[position] & ~self._mask)
                groups[prefix] += (int(entry & self._mask) for entry in part[position : position + 2])
        for rows in groups.values():
            seen: set[bytes] = set()
            for row in set(rows):
                name = self._name(row)
                if name in seen:
                    return name
                seen.add(name)
        return None

    def shards(self, rows: np.ndarray) -> np.ndarray:
        """Return the shard of each row, ``int64`` like ``rows``."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def _find_further(self, name: bytes, wanted: np.uint64, position: int) -> int:
        while position < len(self) and self._entries[position] & ~self._mask == wanted:
            row = int(self._entries[position] & self._mask)
            if self._name(row) == name:
                return row
            position += 1
        return -1

    def _name(self, row: int) -> bytes:
        begin, end = self._spans(np.array([row]))
        return bytes(self._names[int(begin[0]) : int(end[0])]).rstrip(b"\0")

    def _spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Where in the names the key of each row begins and ends.
        shards = self.shards(rows)
        begins = self._name_starts[shards] + (rows - self.starts[shards]) * self._widths[shards]
        return begins, begins + self._widths[shards]
