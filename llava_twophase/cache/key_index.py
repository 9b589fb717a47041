"""Find rows by image key in a sorted array of hashes, without a Python object for each image.

20 million keys of 23 bytes take 8 bytes per key for the hashes and 23 for the keys themselves. All of it is a few
arrays, which may be memory-mapped from a file that processes share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import xxhash

from llava_twophase.errors import UserError

_CHUNK = 1 << 20


class KeyIndex:
    """Finds rows by image key. Processes may share its memory, because nothing in it is written to.

    Args:
        arrays: As ``index_arrays`` returns them.

    Attributes:
        starts: int64, the first row of each shard, and the number of rows.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._names = memoryview(arrays["names"])
        self._widths, self._entries = arrays["widths"], arrays["entries"]
        self.starts = arrays["starts"]
        self._mask = _row_mask(len(self._entries))
        rows = np.diff(self.starts)
        # The first byte of each shard's keys.
        self._begins = np.concatenate([[0], np.cumsum(rows * self._widths)])

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
        for begin, end, width in zip(
            self._begins[:-1].tolist(), self._begins[1:].tolist(), self._widths.tolist(), strict=True
        ):
            part = bytes(self._names[begin:end])
            for start in range(0, len(part), width):
                yield part[start : start + width].rstrip(b"\0")

    def shards(self, rows: np.ndarray) -> np.ndarray:
        """Return the shard of each row, ``int64`` like ``rows``."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def refuse_duplicates(self) -> None:
        """Check that keys are unique.

        Raises:
            UserError: A key occurs twice.
        """
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
        begins = self._begins[shards] + (rows - self.starts[shards]) * widths
        for begin, end in zip(begins.tolist(), (begins + widths).tolist(), strict=True):
            yield bytes(self._names[begin:end]).rstrip(b"\0")


def index_arrays(
    names: bytearray, widths: Sequence[int], rows: Sequence[int], hashes: bytearray
) -> dict[str, np.ndarray]:
    """Make the arrays of an index.

    Args:
        names: The keys of all shards, each padded with zeros to the shard's width.
        widths: For each shard, the bytes of a padded key.
        rows: For each shard, its rows.
        hashes: The XXH3-64 of each key, as uint64. The array is overwritten.

    Returns:
        ``names``: ``uint8``. ``widths``: ``int64 [shards]``. ``starts``: ``int64 [shards + 1]``, the first row of each
        shard, and the number of rows. ``entries``: ``uint64 [rows]``, sorted; the high bits are those of a key's hash,
        the low bits are its row.

    Raises:
        UserError: A key occurs twice.
    """
    # Sorting one array is twice as fast as argsort and takes half the memory. Keys with equal high bits are compared by
    # name.
    entries = np.frombuffer(hashes, np.uint64)
    mask = _row_mask(len(entries))
    for start in range(0, len(entries), _CHUNK):
        part = entries[start : start + _CHUNK]
        part &= ~mask
        part |= np.arange(start, start + len(part), dtype=np.uint64)
    entries.sort()
    arrays: dict[str, np.ndarray] = {
        "names": np.frombuffer(names, np.uint8),
        "widths": np.array(widths, np.int64),
        "starts": np.cumsum([0, *rows]),
        "entries": entries,
    }
    KeyIndex(arrays).refuse_duplicates()
    return arrays


def _row_mask(rows: int) -> np.uint64:
    return np.uint64((1 << max(1, (rows - 1).bit_length())) - 1)
