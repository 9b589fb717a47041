"""Rows of a cache for inspection: a seeded sample, and reads that are compared with their checksums.

Shapes: B rows read at once, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from llava_twophase.cache.key_forms import stored_keys
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.errors import UserError, combined_error

if TYPE_CHECKING:
    from llava_twophase.vision.sources import ImageSource

_BATCH_BYTES = 32 << 20
_SUGGESTIONS = 3
_SAMPLE_KEYS = 64


class CheckedRows:
    """A cache opened for inspection; its extraction may be incomplete.

    Args:
        path: The cache's directory.

    Attributes:
        cache: The cache.

    Raises:
        UserError: There is no cache, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.cache = FeatureCache(path, allow_incomplete=True)
        self._columns: dict[str, np.ndarray] = {}

    @property
    def names(self) -> np.ndarray:
        """The keys of all rows, as bytes."""
        return self._column("image_key")

    def keys(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the keys of rows."""
        return [bytes(self.names[row]).decode("utf-8", "replace") for row in rows]

    def source(self, row: int) -> tuple[int, bytes] | None:
        """Return size and SHA-256 of the image file that a row was made from, None if they were not recorded."""
        digest = self._column("source_sha256")[row].tobytes()
        return (int(self._column("source_size")[row]), digest) if any(digest) else None

    def recorded_sources(self) -> int:
        """Return for how many rows the image file was recorded."""
        return int(self._column("source_sha256").any(axis=1).sum())

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Choose rows, all if there are no more: int64, ascending, the same for the same cache and seed."""
        chosen = np.random.default_rng(seed).choice(len(self.cache), min(count, len(self.cache)), replace=False)
        return np.sort(chosen)

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Look up image keys from a command line: their rows, int64 ``[len(keys)]``.

        A key that is not in the cache is also looked up in the other Unicode normal form: macOS decomposes accents.

        Raises:
            UserError: Keys are not in the cache; reports all of them, with similar keys.
        """
        # In a locale that is not UTF-8, Python gives arguments as surrogates instead of their UTF-8 characters.
        texts = [key.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") for key in keys]
        rows = self.cache.find(stored_keys(self.cache, texts))
        problems = [self._unknown(texts[place]) for place in np.flatnonzero(rows < 0).tolist()]
        if len(problems) == 1:
            raise UserError(problems[0])
        if problems:
            raise combined_error(problems, f"{len(problems)} image keys are not in {self.cache.path}")
        return rows

    def open_images(self, path: str) -> ImageSource:
        """Open a folder or archive of image files.

        In an archive, image keys may be relative to a folder inside it; a sample of the cache's keys decides which.

        Raises:
            UserError: It is neither.
        """
        from llava_twophase.vision.sources import open_images

        return open_images(path, self.keys(self.sample(_SAMPLE_KEYS, 0)))

    def stored(self, rows: np.ndarray) -> np.ndarray:
        """Read rows as they are stored.

        Args:
            rows: int64 ``[B]``.

        Returns:
            ``uint8 [B, row_bytes]``.

        Raises:
            UserError: A row does not match its checksum.
        """
        buffer = np.empty((len(rows), self.cache.codec.row_bytes), np.uint8)
        self.cache.read_raw_rows_into(np.asarray(rows), buffer)
        return buffer

    def values(self, rows: np.ndarray) -> np.ndarray:
        """Read rows as float32 ``[B, L, D]``."""
        return self.cache.codec.to_numpy(self.stored(rows))

    def batches(self, rows: np.ndarray, label: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Read many rows in batches, with a progress bar on stderr if that is a terminal.

        Yields:
            The rows of a batch and their values, float32 ``[B, L, D]``.
        """
        tokens, width = self.cache.feature_shape
        batch = max(1, _BATCH_BYTES // (tokens * width * 4))
        with tqdm(total=len(rows), unit="image", desc=label, disable=None) as bar:
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                yield part, self.values(part)
                bar.update(len(part))

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self.cache.column(name)
        return self._columns[name]

    def _unknown(self, key: str) -> str:
        ending = b"/" + Path(key).name.encode("utf-8", "surrogateescape")
        similar = self.names[np.char.endswith(self.names, ending)][:_SUGGESTIONS]
        examples = [bytes(name).decode("utf-8", "replace") for name in (similar if len(similar) else self.names[:3])]
        return (
            f"image key {key!r} is not in {self.cache.path}; a key is a path relative to the image folder, "
            f"{'perhaps' if len(similar) else 'such as'} {' or '.join(map(repr, examples))}"
        )
