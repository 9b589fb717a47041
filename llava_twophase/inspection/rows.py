"""Rows of a cache for a look at them: a seeded sample, read against its checksums; knows nothing of output.

Shapes: B rows read at once, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from llava_twophase.cache.reader import FeatureCache
from llava_twophase.errors import UserError

SEED = 0
_BATCH_BYTES = 32 << 20


class Rows:
    """A cache opened to be looked at, its extraction complete or not.

    Args:
        path: The cache's directory.

    Attributes:
        cache: The cache.

    Raises:
        UserError: There is no cache, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.cache = FeatureCache(path, allow_incomplete=True)
        self._names: np.ndarray | None = None
        self._checksums: np.ndarray | None = None
        self._digests: np.ndarray | None = None

    @property
    def names(self) -> np.ndarray:
        """The keys of all rows, as bytes."""
        if self._names is None:
            self._names = self.cache.column("image_key")
        return self._names

    def keys(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the keys of rows."""
        return [bytes(self.names[row]).decode("utf-8", "replace") for row in rows]

    def digest(self, row: int) -> bytes:
        """Return the SHA-256 of the image file that a row was made from."""
        if self._digests is None:
            self._digests = self.cache.column("source_sha256")
        return self._digests[row].tobytes()

    def sample(self, count: int, seed: int = SEED) -> np.ndarray:
        """Pick rows, all where there are no more: int64, ascending, the same for the same cache and seed."""
        chosen = np.random.default_rng(seed).choice(len(self.cache), min(count, len(self.cache)), replace=False)
        return np.sort(chosen)

    def find(self, key: str) -> int:
        """Return an image's place in row order.

        Raises:
            UserError: It is not in the cache; names images that are called alike.
        """
        row = int(self.cache.find([key])[0])
        if row >= 0:
            return row
        names = self.names
        alike = names[np.char.endswith(names, b"/" + Path(key).name.encode("utf-8", "surrogateescape"))][:3]
        examples = [bytes(name).decode("utf-8", "replace") for name in (alike if len(alike) else names[:3])]
        raise UserError(
            f"image key {key!r} is not in {self.cache.path}; a key is a path relative to the image folder, "
            f"{'perhaps' if len(alike) else 'such as'} {' or '.join(map(repr, examples))}"
        )

    def stored(self, rows: np.ndarray) -> np.ndarray:
        """Read rows as they are stored, against their checksums.

        Args:
            rows: int64 ``[B]``.

        Returns:
            ``uint8 [B, row_bytes]``.

        Raises:
            UserError: Bytes of a row changed since they were written.
        """
        if self._checksums is None:
            self._checksums = self.cache.column("row_xxh3")
        buffer = np.empty((len(rows), self.cache.codec.row_bytes), np.uint8)
        self.cache.read_raw_rows_into(np.asarray(rows), buffer)
        for row, stored in zip(rows, buffer, strict=True):
            if xxhash.xxh3_64_intdigest(stored) != int(self._checksums[row]):
                (key,) = self.keys([row])
                raise UserError(f"the features of {key!r} do not match their checksum; verify names all such images")
        return buffer

    def values(self, rows: np.ndarray) -> np.ndarray:
        """Read rows as float32 ``[B, L, D]``, against their checksums."""
        return self.cache.codec.to_numpy(self.stored(rows))

    def batches(self, rows: np.ndarray, label: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Read many rows, some at a time; a progress bar goes to stderr where that is a terminal.

        Yields:
            The rows and their values, float32 ``[B, L, D]``.
        """
        tokens, width = self.cache.feature_shape
        batch = max(1, _BATCH_BYTES // (tokens * width * 4))
        with tqdm(total=len(rows), unit="image", desc=label, disable=None) as bar:
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                yield part, self.values(part)
                bar.update(len(part))


def twins(cache: FeatureCache) -> list[np.ndarray]:
    """Find the pictures that stand in a cache under several keys, byte for byte: their rows, the most frequent first.

    By the first eight bytes of their SHA-256, which is enough: two of 558K pictures share them by chance once in 10^8.
    """
    digests = np.ascontiguousarray(cache.column("source_sha256")[:, :8]).view("<u8").ravel()
    order = np.argsort(digests, kind="stable")
    starts = np.flatnonzero(np.diff(digests[order], prepend=~digests[order[:1]]))
    counts = np.diff(np.append(starts, len(order)))
    groups = np.flatnonzero(counts > 1)
    groups = groups[np.argsort(-counts[groups], kind="stable")]
    return [order[starts[group] : starts[group] + counts[group]] for group in groups]
