"""The rows of a cache for many image keys, looked up a part at a time, and once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_twophase.cache.joined import AnyCache

_PART = 1 << 16  # keys that are Python objects at the same time


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
        starts = range(0, max(len(keys), 1), _PART)
        rows = np.concatenate([self._cache.find(keys[start : start + _PART]) for start in starts])
        self._known.append((keys, rows))
        return rows
