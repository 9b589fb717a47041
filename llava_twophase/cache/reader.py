"""Image keys to patch features, by positioned reads into the caller's buffer; knows nothing of HDF5.

A shard's header says where its bytes lie, so no HDF5 handle is ever open: nothing to lock, nothing to lose over a fork.

Shapes: B rows asked for, L tokens, D width (576 and 1024 for CLIP-L/14-336).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.cache.format import QUANTISED, STORAGE_DTYPES, Header, fingerprint_hash
from llava_twophase.cache.key_index import KeyIndex
from llava_twophase.cache.manifest import Manifest, read_manifest
from llava_twophase.cache.shard_files import ShardFiles, check_shard, read_header
from llava_twophase.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["FeatureCache", "check_shard", "read_header"]


class FeatureCache:
    """A feature cache, opened for reading.

    Safe under fork and spawn, and to share between threads; keeps few files open however many shards there are.

    Args:
        path: The cache's directory.
        allow_incomplete: Open a cache whose extraction was cut, with the shards its manifest lists.
        manifest: Take this instead of reading ``manifest.json``.

    Attributes:
        feature_shape: Tokens and width of one image's features.
        dtype: Storage dtype, a key of ``STORAGE_DTYPES``.
        codec: Turns stored rows into features.

    Raises:
        UserError: There is no cache, it is incomplete or damaged, or has another format version.
    """

    def __init__(self, path: str | Path, allow_incomplete: bool = False, manifest: Manifest | None = None) -> None:
        self.path = Path(path)
        self._arguments = (path, allow_incomplete, manifest)
        self.manifest = manifest or read_manifest(self.path)
        if not self.manifest.complete and not allow_incomplete:
            raise UserError(f"{path} is incomplete: its extraction was cut; run the same extraction command again")
        if not self.manifest.shards:
            raise UserError(f"{path} holds no features")
        self._files = ShardFiles(self.path, self.manifest.shards)
        self.headers = self._open_shards()
        first = self.headers[0]
        self.feature_shape, self.dtype = first.feature_shape, first.storage
        self.codec = Codec(self.dtype, self.feature_shape, self._channels())
        # For each part of a row: where it starts in each shard, and its bytes.
        self._parts = [
            (np.array([header.row_parts[part].offset for header in self.headers]), data.row_bytes)
            for part, data in enumerate(first.row_parts)
        ]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes a feature value."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._index)

    def __contains__(self, key: object) -> bool:
        """Tell whether an image's features are here."""
        return isinstance(key, str) and bool(self.find([key])[0] >= 0)

    def keys(self) -> Iterator[str]:
        """Iterate over image keys in row order."""
        return map(_text, self._index.names())

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Look up many images at once: their rows ``int64 [len(keys)]``, -1 for those that are not here."""
        return self._index.find(keys)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """List the keys without features here, in their order."""
        return [keys[position] for position in np.flatnonzero(self.find(keys) < 0).tolist()]

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Look up many images at once.

        Returns:
            Their rows, ``int64 [len(keys)]``.

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
            UserError: A key is not in the cache, or a file is truncated.
        """
        buffer = self._buffer(len(keys))
        self.read_raw_into(keys, buffer)
        return self.codec.to_numpy(buffer)

    def read_raw(self, keys: Sequence[str]) -> np.ndarray:
        """Read rows into a new array.

        Args:
            keys: Image keys, in any order, repeated or not.

        Returns:
            As stored: ``[B, L, D]`` where storage is exact (uint16 bits for bfloat16), else ``uint8 [B, row_bytes]``.

        Raises:
            UserError: A key is not in the cache, or a file is shorter than it says.
        """
        buffer = self._buffer(len(keys))
        self.read_raw_into(keys, buffer)
        if self.dtype in QUANTISED:
            return buffer
        return buffer.view(STORAGE_DTYPES[self.dtype]).reshape(len(keys), *self.feature_shape)

    def read_raw_into(self, keys: Sequence[str], buffer: np.ndarray) -> None:
        """Read rows into the caller's memory, a pinned buffer for one.

        Args:
            keys: Image keys, in any order, repeated or not.
            buffer: C-contiguous, of ``len(keys) * codec.row_bytes`` bytes. Reading is twice as fast where it begins at
                a multiple of 64 bytes, as torch's memory does and numpy's does not.

        Raises:
            UserError: A key is not in the cache, or a file is shorter than it says.
            ValueError: The buffer has another size, or numpy would have to copy it.
        """
        self.read_raw_rows_into(self.rows(keys), buffer)

    def read_raw_rows_into(self, rows: np.ndarray, buffer: np.ndarray) -> None:
        """Read rows whose numbers ``rows`` or ``find`` gave; as ``read_raw_into`` otherwise."""
        row_bytes = self.codec.row_bytes
        if not buffer.flags.c_contiguous or buffer.nbytes != len(rows) * row_bytes:
            raise ValueError(f"the buffer must be C-contiguous and hold {len(rows)} rows of {row_bytes} bytes")
        view = memoryview(buffer.reshape(-1).view(np.uint8))
        for position, begin, shard, offset, count in self._pieces(rows):
            at = position * row_bytes + begin
            self._files.read_into(shard, view[at : at + count], offset)

    def will_need(self, rows: np.ndarray) -> None:
        """Tell the system that rows will be read soon: it fetches all of them at once, whatever reads them later."""
        for _, _, shard, offset, count in self._pieces(rows):
            self._files.will_need(shard, offset, count)

    def read_tensor(self, keys: Sequence[str]) -> torch.Tensor:
        """Read features as a new tensor ``[B, L, D]``: in the storage dtype where it is exact, else float32."""
        import torch

        rows = torch.empty(len(keys), self.codec.row_bytes, dtype=torch.uint8)
        self.read_raw_into(keys, rows.numpy())
        return self.codec.from_rows(rows)

    def column(self, name: str) -> np.ndarray:
        """Read one of the per-row datasets of all shards, such as ``source_sha256``, in row order."""
        return np.concatenate([self._read_dataset(shard, name) for shard in range(len(self.headers))])

    def __reduce__(self) -> tuple[Any, ...]:
        """Be opened again where it is pickled, a spawned worker for one, instead of copying the index."""
        return type(self), self._arguments

    def close(self) -> None:
        """Close files; the next read opens them again."""
        self._files.close()

    def _pieces(self, rows: np.ndarray) -> Iterator[tuple[int, int, int, int, int]]:
        # Of each row's parts: the row's place in rows, where the part begins in a stored row, its shard, offset, bytes.
        shards = self._index.shards(rows)
        inside = rows - self._index.starts[shards]
        files = shards.tolist()
        begin = 0
        for starts, count in self._parts:
            offsets = (starts[shards] + inside * count).tolist()
            for position, (shard, offset) in enumerate(zip(files, offsets, strict=True)):
                yield position, begin, shard, offset, count
            begin += count

    def _buffer(self, rows: int) -> np.ndarray:
        # Begins at a multiple of 64 bytes, for speed.
        raw = np.empty(rows * self.codec.row_bytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + rows * self.codec.row_bytes].reshape(rows, self.codec.row_bytes)

    def _channels(self) -> Channels | None:
        if self.dtype not in QUANTISED:
            return None
        channels = Channels(self._read_dataset(0, "channel_mean"), self._read_dataset(0, "channel_std"))
        named = self.fingerprint.get("channels")
        if not isinstance(named, dict) or channels.sha256() != named.get("sha256"):
            raise UserError(f"{self.manifest.shards[0].file} has other channels than its fingerprint says")
        return channels

    def _open_shards(self) -> list[Header]:
        # Each file once: its header, and its keys for the index.
        fingerprint = fingerprint_hash(self.fingerprint)
        headers: list[Header] = []
        names, widths, hashes = [], [], bytearray()
        for shard, entry in enumerate(self.manifest.shards):
            header = self._files.header(shard, fingerprint)
            if headers and (header.feature_shape, header.storage) != (headers[0].feature_shape, headers[0].storage):
                raise UserError(f"{entry.file} has other shapes or another dtype than {self.manifest.shards[0].file}")
            headers.append(header)
            keys = header.datasets["image_key"]
            names.append(self._files.read(shard, keys))
            widths.append(keys.row_bytes)
            hashes += self._files.read(shard, header.datasets["key_xxh3"])
        self._index = KeyIndex(names, widths, hashes)
        return headers

    def _read_dataset(self, shard: int, name: str) -> np.ndarray:
        data = self.headers[shard].datasets[name]
        return np.frombuffer(self._files.read(shard, data), data.numpy_dtype).reshape(data.shape)


def _text(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"image key {name!r} is not UTF-8: the cache is damaged; verify names the shard") from None
