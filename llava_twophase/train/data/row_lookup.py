"""The rows of a cache for many image keys, looked up a part at a time, and once.

For millions of records they are kept in a file in ``~/.cache/llava-twophase/rows``, which all processes of a machine
map. The file's name is the SHA-256 of the records and of the cache's shards. Rows are kept only if no key is absent: a
damaged shard, which is not detected before one of its rows is read, can hide keys until it is repaired.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np

from llava_twophase.cache.joined import AnyCache, caches_of
from llava_twophase.records import ImageKeys
from llava_twophase.shared_arrays import Arrays, shared_arrays, user_cache

_PART = 1 << 16  # keys that are Python objects at the same time
_SHARED_FROM = 2_000_000  # fewer are found in two seconds


class _Incomplete(Exception):
    """Rows that are not kept, because keys are absent."""

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.rows = rows


class RowLookup:
    """Finds rows, and remembers them: 12 million keys take a quarter of a minute, and training asks for them twice.

    Args:
        cache: The feature cache, or the joined caches.
    """

    def __init__(self, cache: AnyCache) -> None:
        self._cache = cache
        self._known: list[tuple[Sequence[str], np.ndarray]] = []

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return what ``find`` of the cache returns: int64 ``[N]``, joined ``[N, C]``; -1 where a key is absent.

        Args:
            keys: Image keys. The rows of this object are remembered, so it must not change.
        """
        for known, rows in self._known:
            if known is keys:
                return rows
        if isinstance(keys, ImageKeys) and len(keys) >= _SHARED_FROM:
            path = user_cache("rows") / f"{self._identity(keys)}.arrays"
            try:
                rows = shared_arrays(path, lambda: self._find_all(keys))["rows"]
            except _Incomplete as found:
                rows = found.rows
        else:
            rows = self._find(keys)
        self._known.append((keys, rows))
        return rows

    def _find_all(self, keys: Sequence[str]) -> Arrays:
        rows = self._find(keys)
        if (rows < 0).any():
            raise _Incomplete(rows)
        return {"rows": rows}

    def _find(self, keys: Sequence[str]) -> np.ndarray:
        starts = range(0, max(len(keys), 1), _PART)
        return np.concatenate([self._cache.find(keys[start : start + _PART]) for start in starts])

    def _identity(self, keys: ImageKeys) -> str:
        # A shard's checksum covers its keys. Joined caches are asked for other Unicode forms of a key.
        digest = hashlib.sha256(f"rows 1 {unicodedata.unidata_version}\n{keys.identity()}\n".encode())
        for cache in caches_of(self._cache):
            shards = "".join(f"{entry.rows} {entry.xxh3_128}\n" for entry in cache.manifest.shards)
            digest.update(f"cache\n{shards}".encode())
        return digest.hexdigest()
