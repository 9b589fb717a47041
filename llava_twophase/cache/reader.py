"""``FeatureCache``: read patch features by image key.

Rows are read at byte offsets that the shards' headers give, without HDF5: there is no lock, and no handle that a fork
could break. Every row that is read is compared with its checksum.

Shapes: B rows requested, L tokens, D width (576 and 1024 for CLIP-L/14-336).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.cache.format import QUANTISED, STORAGE_DTYPES
from llava_twophase.cache.key_forms import refuse_single_key
from llava_twophase.cache.manifest import Manifest, read_manifest
from llava_twophase.cache.opening import open_shards
from llava_twophase.cache.rows import StoredRows
from llava_twophase.cache.shard_files import ShardFiles
from llava_twophase.cache.storage import Staging, Storage, open_storage, staged_storage
from llava_twophase.errors import UserError

if TYPE_CHECKING:
    import torch

    from llava_twophase.cache.staging import Stage

_ALIGNMENT = 64


class FeatureCache:
    """A feature cache, opened for reading.

    Instances can be shared between threads and survive fork and spawn. The number of open files does not depend on the
    number of shards. At a URL, the rows of a call are requested together, and failed requests are repeated. Processes
    share the index of a complete cache that has more than two million images: see ``opening.py``.

    Args:
        path: The cache's directory, or its URL, such as ``s3://bucket/cache``.
        allow_incomplete: Also open a cache that is not complete yet, with the shards that its manifest lists.
        manifest: Use this manifest instead of reading ``manifest.json``.
        stage: Keeps copies of the shards of a remote cache on this machine.

    Attributes:
        path: The cache's directory, or its URL as a string.
        manifest: The manifest.
        headers: The header of each shard.
        feature_shape: Tokens and width of one image's features.
        dtype: Storage dtype, a key of ``STORAGE_DTYPES``.
        codec: Turns stored rows into features.

    Raises:
        UserError: There is no cache, or it is incomplete, damaged, or of another format version.
    """

    def __init__(
        self,
        path: str | Path,
        allow_incomplete: bool = False,
        manifest: Manifest | None = None,
        stage: Stage | None = None,
    ) -> None:
        self._storage = open_storage(path)
        self.path: Path | str = self._storage.folder or str(path)
        self._arguments = (path, allow_incomplete, manifest, stage)
        self.manifest = manifest or read_manifest(self._storage)
        if not self.manifest.complete and not allow_incomplete:
            raise UserError(f"{path} is incomplete: run the same extraction command again, which resumes it")
        if not self.manifest.shards:
            raise UserError(f"{path} has no features")
        if stage is not None and self._storage.folder is None:
            self._storage = staged_storage(self._storage, stage, self.manifest)
        self._files = ShardFiles(self._storage, self.manifest.shards)
        # A request for keys brings checksums with it. From a disk, they are read with a shard's first row.
        try:
            opened = open_shards(
                self._files,
                self.manifest,
                with_checksums=self._storage.folder is None,
                share=self.manifest.complete and manifest is None,
            )
        except BaseException:
            self.close()
            raise
        self.headers, self._index = opened.headers, opened.index
        self._rows = StoredRows(self._storage, self._files, self.headers, self._index.starts, opened.checksums)
        first = self.headers[0]
        self.feature_shape, self.dtype = first.feature_shape, first.storage
        self.codec = Codec(self.dtype, self.feature_shape, self._channels())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes a feature value."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        """Return whether the cache has an image's features."""
        return isinstance(key, str) and bool(self.find([key])[0] >= 0)

    def keys(self) -> Iterator[str]:
        """Iterate over image keys in row order."""
        return map(_text, self._index.names())

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Return the row of each key, ``int64 [len(keys)]``; -1 for keys that are not in the cache."""
        refuse_single_key(keys)
        return self._index.find(keys)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return the keys that are not in the cache, in their order."""
        return [keys[position] for position in np.flatnonzero(self.find(keys) < 0).tolist()]

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Return the row of each key, ``int64 [len(keys)]``.

        Raises:
            UserError: A key is not in the cache.
        """
        rows = self.find(keys)
        if len(rows) and rows.min() < 0:
            raise UserError(f"image key {keys[int(rows.argmin())]!r} is not in the feature cache {self.path}")
        return rows

    def read(self, keys: Sequence[str]) -> np.ndarray:
        """Read features as float32 ``[B, L, D]``, without torch.

        Args:
            keys: Image keys in any order; repeats are allowed.

        Raises:
            UserError: A key is not in the cache, a shard cannot be read or is truncated, or a row does not match its
                checksum.
        """
        buffer = self._buffer(len(keys))
        self.read_raw_into(keys, buffer)
        return self.codec.to_numpy(buffer)

    def read_tensor(self, keys: Sequence[str]) -> torch.Tensor:
        """Read features as a new tensor ``[B, L, D]``: in the storage dtype if that is exact, else float32.

        Raises:
            UserError: As ``read``.
        """
        import torch

        rows = torch.empty(len(keys), self.codec.row_bytes, dtype=torch.uint8)
        self.read_raw_into(keys, rows.numpy())
        return self.codec.from_rows(rows)

    def read_raw(self, keys: Sequence[str]) -> np.ndarray:
        """Read stored rows into a new array.

        Args:
            keys: Image keys in any order; repeats are allowed.

        Returns:
            ``[B, L, D]`` for exact storage dtypes (uint16 bits for bfloat16), else ``uint8 [B, row_bytes]``.

        Raises:
            UserError: As ``read``.
        """
        buffer = self._buffer(len(keys))
        self.read_raw_into(keys, buffer)
        if self.dtype in QUANTISED:
            return buffer
        return buffer.view(STORAGE_DTYPES[self.dtype]).reshape(len(keys), *self.feature_shape)

    def read_raw_into(self, keys: Sequence[str], buffer: np.ndarray) -> None:
        """Read stored rows into the caller's memory, for example a pinned buffer.

        Args:
            keys: Image keys in any order; repeats are allowed.
            buffer: C-contiguous, of ``len(keys) * codec.row_bytes`` bytes, or ``uint8 [len(keys), codec.row_bytes]``
                with contiguous rows. Reading is twice as fast if rows start at multiples of 64 bytes, as torch's memory
                does and numpy's does not.

        Raises:
            UserError: As ``read``.
            ValueError: The buffer has another size, or its rows are not contiguous.
        """
        self.read_raw_rows_into(self.rows(keys), buffer)

    def read_raw_rows_into(self, rows: np.ndarray, buffer: np.ndarray) -> None:
        """Read stored rows as ``read_raw_into``, by the row numbers that ``rows`` or ``find`` returned.

        Raises:
            UserError: A shard cannot be read or is truncated, or a row does not match its checksum.
            ValueError: As ``read_raw_into``.
        """
        target = _stored_rows(buffer, len(rows), self.codec.row_bytes)
        self._rows.read_into(self._places(rows), target)

    def will_need(self, rows: np.ndarray) -> None:
        """Ask the system to fetch rows in the background, because they will be read soon."""
        self._rows.will_need(self._places(rows))

    @property
    def storage(self) -> Storage:
        """Where the files of the cache are."""
        return self._storage

    @property
    def is_remote(self) -> bool:
        """Whether the cache is at a URL."""
        return self._storage.folder is None

    def stage_ahead(self, rows: np.ndarray) -> None:
        """Copy shards to the stage in the background; without a stage, do nothing.

        Args:
            rows: The rows that will be used, in the order of use. ``advance`` counts those that have been used.
        """
        if isinstance(self._storage, Staging):
            self._storage.stage_ahead(self._index.shards(rows))

    def advance(self, count: int) -> None:
        """Record that so many rows of the order of ``stage_ahead`` have been used."""
        if isinstance(self._storage, Staging):
            self._storage.advance(count)

    def column(self, name: str) -> np.ndarray:
        """Read one of the per-row datasets, such as ``source_sha256``, of all shards in row order."""
        return np.concatenate([self._read_dataset(shard, name) for shard in range(len(self.headers))])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments only; the other process reopens the cache."""
        return type(self), self._arguments

    def close(self) -> None:
        """Close files, which the next read opens again; give up what other threads read or copy from a URL."""
        self._storage.close()
        self._files.close()

    def _places(self, rows: np.ndarray) -> Iterator[tuple[int, int]]:
        # For each row: its shard, and its row there.
        shards = self._index.shards(rows)
        return zip(shards.tolist(), (rows - self._index.starts[shards]).tolist(), strict=True)

    def _buffer(self, rows: int) -> np.ndarray:
        # Aligned, which makes reading faster: see read_raw_into.
        raw = np.empty(rows * self.codec.row_bytes + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        return raw[start : start + rows * self.codec.row_bytes].reshape(rows, self.codec.row_bytes)

    def _channels(self) -> Channels | None:
        if self.dtype not in QUANTISED:
            return None
        channels = Channels(self._read_dataset(0, "channel_mean"), self._read_dataset(0, "channel_std"))
        expected = self.fingerprint.get("channels")
        if not isinstance(expected, dict) or channels.sha256() != expected.get("sha256"):
            raise UserError(f"{self.manifest.shards[0].file} has other channels than its fingerprint states")
        return channels

    def _read_dataset(self, shard: int, name: str) -> np.ndarray:
        return self._files.open(shard).read_dataset(self.headers[shard].datasets[name])


def _stored_rows(buffer: np.ndarray, count: int, row_bytes: int) -> np.ndarray:
    # The buffer as uint8 [count, row_bytes].
    if buffer.flags.c_contiguous and buffer.nbytes == count * row_bytes:
        return buffer.reshape(-1).view(np.uint8).reshape(count, row_bytes)
    if buffer.dtype == np.uint8 and buffer.shape == (count, row_bytes) and buffer.strides[1] == 1:
        return buffer
    raise ValueError(f"the buffer must be C-contiguous and hold {count} rows of {row_bytes} bytes")


def _text(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"image key {name!r} is not UTF-8: the cache is damaged; verify reports the shard") from None
