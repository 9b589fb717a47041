"""``JoinedCaches``: several feature caches that are read as one, joined on channels by image key.

Shapes: B rows requested, C caches; L tokens and D width of the joined features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_twophase.cache.codec import Codec
from llava_twophase.cache.key_forms import stored_keys
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.errors import UserError
from llava_twophase.joining import join_features, joined_fingerprint, joined_shape

if TYPE_CHECKING:
    import torch

    from llava_twophase.cache.staging import Stage

_ALIGNMENT = 64


class JoinedCaches:
    """Several feature caches, read as one: the features of an image are those of all caches, joined on channels.

    Width, storage dtype, row order, number of images and the Unicode normalisation form of keys may differ between the
    caches. Like ``FeatureCache``, instances
    can be shared between threads, survive fork and can be pickled, and every row that is read is compared with its
    checksum.

    Args:
        caches: The caches or their paths, in the order of their channels.
        interpolate: Resample patch grids of other sizes to the first cache's, as ``join_features`` does.

    Attributes:
        caches: The opened caches.
        feature_shape: Tokens and width of one image's joined features.
        codec: Turns stored rows into joined features.

    Raises:
        UserError: A cache cannot be opened, or the numbers of tokens differ without ``interpolate``.
    """

    def __init__(self, caches: Sequence[FeatureCache | str | Path], interpolate: bool = False) -> None:
        if len(caches) < 2:
            raise UserError(f"expected at least two feature caches to join, {len(caches)} given")
        self.caches = tuple(cache if isinstance(cache, FeatureCache) else FeatureCache(cache) for cache in caches)
        self._interpolate = interpolate
        names = [str(cache.path) for cache in self.caches]
        self.feature_shape = joined_shape([cache.feature_shape for cache in self.caches], names, interpolate)
        self.codec = JoinedCodec([cache.codec for cache in self.caches])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes a feature value: the fingerprints of all caches, in their order."""
        return joined_fingerprint([cache.fingerprint for cache in self.caches], self._interpolate)

    def __len__(self) -> int:
        """Return the number of images that all caches have."""
        return sum(1 for _ in self.keys())

    def __contains__(self, key: object) -> bool:
        """Return whether all caches have an image's features."""
        return isinstance(key, str) and bool((self.find([key]) >= 0).all())

    def keys(self) -> Iterator[str]:
        """Iterate over the image keys that all caches have, in the row order of the first."""
        keys = list(self.caches[0].keys())
        return (keys[position] for position in np.flatnonzero((self.find(keys) >= 0).all(axis=1)).tolist())

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return the row of each key in each cache, ``int64 [len(keys), C]``; -1 where a cache does not have it."""
        return np.stack([cache.find(stored_keys(cache, keys)) for cache in self.caches], axis=1)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return the keys that at least one cache does not have, in their order."""
        return [keys[position] for position in np.flatnonzero((self.find(keys) < 0).any(axis=1)).tolist()]

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Return the row of each key in each cache, ``int64 [len(keys), C]``.

        Raises:
            UserError: A cache does not have a key; the message has the cache's path.
        """
        return np.stack([cache.rows(stored_keys(cache, keys)) for cache in self.caches], axis=1)

    def read(self, keys: Sequence[str]) -> np.ndarray:
        """Read joined features as float32 ``[B, L, D]``.

        Raises:
            UserError: As ``FeatureCache.read``, for each cache.
        """
        values: np.ndarray = self.read_tensor(keys).float().numpy()
        return values

    def read_tensor(self, keys: Sequence[str]) -> torch.Tensor:
        """Read joined features as a new tensor ``[B, L, D]``, in the smallest dtype that holds all parts exactly.

        Raises:
            UserError: As ``FeatureCache.read``, for each cache.
        """
        return join_features([cache.read_tensor(stored_keys(cache, keys)) for cache in self.caches])

    def read_raw_rows_into(self, rows: np.ndarray, buffer: np.ndarray) -> None:
        """Read stored rows into the caller's memory, for example a pinned buffer; ``codec.from_rows`` decodes them.

        Args:
            rows: ``int64 [B, C]``, as ``rows`` returns them.
            buffer: ``uint8 [B, codec.row_bytes]``, each row contiguous.

        Raises:
            UserError: As ``FeatureCache.read_raw_rows_into``, for each cache.
            ValueError: The buffer has another shape, or its rows are not contiguous.
        """
        if buffer.dtype != np.uint8 or buffer.shape != (len(rows), self.codec.row_bytes):
            raise ValueError(
                f"the buffer is {buffer.dtype} {buffer.shape}, expected uint8 {(len(rows), self.codec.row_bytes)}"
            )
        for position, (cache, part) in enumerate(zip(self.caches, self.codec.parts, strict=True)):
            cache.read_raw_rows_into(rows[:, position], buffer[:, part])

    def will_need(self, rows: np.ndarray) -> None:
        """Ask the system to fetch rows ``int64 [B, C]`` in the background, because they will be read soon."""
        for position, cache in enumerate(self.caches):
            cache.will_need(rows[:, position])

    @property
    def is_remote(self) -> bool:
        """Whether a cache is at a URL."""
        return any(cache.is_remote for cache in self.caches)

    def stage_ahead(self, rows: np.ndarray) -> None:
        """Copy shards of rows ``int64 [B, C]`` to the stage in the background, as ``FeatureCache.stage_ahead``."""
        for position, cache in enumerate(self.caches):
            cache.stage_ahead(rows[:, position])

    def advance(self, count: int) -> None:
        """Record that so many rows of the order of ``stage_ahead`` have been used."""
        for cache in self.caches:
            cache.advance(count)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments only; the other process reopens the caches."""
        return type(self), (self.caches, self._interpolate)

    def close(self) -> None:
        """Close files; the next read opens them again."""
        for cache in self.caches:
            cache.close()


class JoinedCodec:
    """Turns the stored rows of several caches into joined features.

    A stored row is the rows of all caches, one after another. Each begins at a multiple of 64 bytes, which makes
    reading faster.

    Args:
        codecs: Those of the caches.

    Attributes:
        parts: The bytes of each cache in a stored row.
        row_bytes: Bytes of a stored row.
    """

    def __init__(self, codecs: Sequence[Codec]) -> None:
        self._codecs = tuple(codecs)
        self.parts: list[slice] = []
        end = 0
        for codec in self._codecs:
            self.parts.append(slice(end, end + codec.row_bytes))
            end += -(-codec.row_bytes // _ALIGNMENT) * _ALIGNMENT
        self.row_bytes = end

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Convert stored rows to joined features, on their device.

        Args:
            rows: ``uint8 [B, row_bytes]``.

        Returns:
            A new tensor ``[B, L, D]``, in the smallest dtype that holds all parts exactly.
        """
        pairs = zip(self._codecs, self.parts, strict=True)
        return join_features([codec.from_rows(rows[:, part]) for codec, part in pairs])


AnyCache = FeatureCache | JoinedCaches
"""One feature cache, or several joined ones."""


def open_caches(paths: Sequence[str | Path], interpolate: bool = False, stage: Stage | None = None) -> AnyCache:
    """Open one cache, or several to read them as one.

    Args:
        paths: Their folders or URLs.
        interpolate: Resample patch grids of other sizes to the first cache's.
        stage: Keeps copies of the shards of remote caches on this machine.

    Raises:
        UserError: As ``FeatureCache`` and ``JoinedCaches``.
    """
    caches = [FeatureCache(path, stage=stage) for path in paths]
    return caches[0] if len(caches) == 1 else JoinedCaches(caches, interpolate)


def caches_of(cache: AnyCache) -> tuple[FeatureCache, ...]:
    """Return the caches that are read: the joined ones, or the one."""
    return cache.caches if isinstance(cache, JoinedCaches) else (cache,)
