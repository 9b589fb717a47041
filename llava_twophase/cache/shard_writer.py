"""Writes one shard: rows into a work file, which is sealed by fsync and rename."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.cache.format import ROW_PARTS, fingerprint_hash, layout
from llava_twophase.cache.hdf5 import create_shard_file
from llava_twophase.cache.header import Header
from llava_twophase.cache.manifest import ShardEntry
from llava_twophase.cache.shard import checksum_around
from llava_twophase.errors import UserError
from llava_twophase.files import sync_folder


@dataclass(frozen=True)
class ShardSpec:
    """What all shards of a cache share.

    Attributes:
        feature_shape: Tokens and width of one row.
        storage_dtype: A key of ``STORAGE_DTYPES``.
        fingerprint: What changes a feature value.
        provenance: What is only recorded. It holds no hosts or dates, so that equal work gives equal bytes.
        channels: For int8 and int4.
    """

    feature_shape: tuple[int, int]
    storage_dtype: str
    fingerprint: dict[str, Any]
    provenance: dict[str, Any]

    channels: Channels | None = None

    @property
    def codec(self) -> Codec:
        """The codec that makes stored rows from features."""
        return Codec(self.storage_dtype, self.feature_shape, self.channels)

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one image's features."""
        return self.codec.row_bytes


class NotFiniteError(UserError):
    """Features hold inf or NaN.

    Attributes:
        rows: int64, the positions of these rows among the rows to append.
    """

    def __init__(self, keys: Sequence[str], rows: np.ndarray) -> None:
        super().__init__(f"the features of {list(keys[:5])} are not finite: they hold inf or NaN")
        self.rows = rows


class ShardWriter:
    """Writes the rows of one shard in order, then seals it.

    HDF5 lays out an empty file, and every value is then written at its offset. So a killed process leaves nothing that
    looks like a shard, and equal rows give an equal file, byte for byte.

    Args:
        path: The sealed file's path. The work file beside it ends in ``.tmp``, and no other process uses its name.
        keys: The image key of each row to append.
        spec: What all shards share.
    """

    def __init__(self, path: Path, keys: Sequence[str], spec: ShardSpec) -> None:
        self.path = path
        self._spec, self._codec = spec, spec.codec
        self._keys = list(keys)
        self._descriptor = -1
        self._lay_out()
        self._columns = {
            name: np.zeros(self._datasets[name].shape, self._datasets[name].numpy_dtype)
            for name in ("row_xxh3", "source_size", "source_sha256")
        }
        self._written = 0

    def drop(self, key: str) -> None:
        """Drop a key that has not been written yet: the shard becomes the one that is written without it."""
        self._keys.remove(key)

    def append(self, rows: np.ndarray, sources: Sequence[tuple[int, bytes]]) -> None:
        """Write the next rows.

        Args:
            rows: Stored rows ``uint8 [B, row_bytes]``, as ``Codec.to_rows`` makes them; or, the same bytes, values
                ``[B, L, D]`` of exact storage.
            sources: Size in bytes and SHA-256 of each image file.

        Raises:
            NotFiniteError: Some values are not finite; none of these rows is written.
        """
        rows = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
        assert rows.shape[1] == self._codec.row_bytes
        first, last = self._written, self._written + len(rows)
        finite = self._codec.finite(rows)
        if not finite.all():
            bad = np.flatnonzero(~finite)
            raise NotFiniteError([self._keys[first + row] for row in bad], bad)
        start = 0
        for name in ROW_PARTS:
            if name in self._datasets:
                data = self._datasets[name]
                part = np.ascontiguousarray(rows[:, start : start + data.row_bytes])
                pwrite_all(self._descriptor, part, data.offset + first * data.row_bytes)
                start += data.row_bytes
        self._columns["row_xxh3"][first:last] = [xxhash.xxh3_64_intdigest(row) for row in rows]
        self._columns["source_size"][first:last] = [size for size, _ in sources]
        self._columns["source_sha256"][first:last] = [np.frombuffer(digest, np.uint8) for _, digest in sources]
        self._written = last

    def seal(self) -> ShardEntry:
        """Write the columns and the header, sync the file, rename it and sync the folder.

        Returns:
            The shard's entry for the manifest.
        """
        if self._written != len(self._keys):
            raise ValueError(f"{self.path.name} has {self._written} of {len(self._keys)} rows")
        if self._written < self._datasets["features"].shape[0]:
            self._shrink()
        for name, values in self._all_columns().items():
            pwrite_all(self._descriptor, values, self._datasets[name].offset)
        size = os.fstat(self._descriptor).st_size
        header = Header(self._spec.storage_dtype, fingerprint_hash(self._spec.fingerprint), size, self._datasets, "")
        digest = checksum_around(partial(os.pread, self._descriptor), header)
        header = replace(header, xxh3_128=digest)
        pwrite_all(self._descriptor, np.frombuffer(header.to_bytes(), np.uint8), 0)
        os.fsync(self._descriptor)
        self._close()
        self._aside.replace(self.path)
        sync_folder(self.path.parent)
        return ShardEntry(self.path.name, header.rows, size, digest)

    def discard(self) -> None:
        """Close and remove the work file, if there is one."""
        self._close()
        self._aside.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _lay_out(self) -> None:
        # A random name: a rank of an earlier run that is still alive must not write into this file.
        self._aside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.tmp")
        spec = self._spec
        key_bytes = max(len(key.encode("utf-8")) for key in self._keys)
        shapes = layout(spec.storage_dtype, len(self._keys), spec.feature_shape, key_bytes)
        self._datasets = create_shard_file(
            self._aside, spec.storage_dtype, shapes, fingerprint=spec.fingerprint, provenance=spec.provenance
        )
        self._descriptor = os.open(self._aside, os.O_RDWR)

    def _shrink(self) -> None:
        # Keys were dropped, which is rare: lay out the file again and copy what was written.
        before, descriptor, aside = self._datasets, self._descriptor, self._aside
        self._lay_out()
        for name in ROW_PARTS:
            if name in before:
                source, target = before[name].offset, self._datasets[name]
                for start in range(0, target.nbytes, 1 << 24):
                    piece = os.pread(descriptor, min(1 << 24, target.nbytes - start), source + start)
                    pwrite_all(self._descriptor, np.frombuffer(piece, np.uint8), target.offset + start)
        os.close(descriptor)
        aside.unlink()

    def _all_columns(self) -> dict[str, np.ndarray]:
        names = [key.encode("utf-8") for key in self._keys]
        columns = {name: values[: self._written] for name, values in self._columns.items()}
        columns["image_key"] = np.array(names, self._datasets["image_key"].numpy_dtype)
        columns["key_xxh3"] = np.array([xxhash.xxh3_64_intdigest(name) for name in names], np.uint64)
        if self._spec.channels is not None:
            columns["channel_mean"], columns["channel_std"] = self._spec.channels.mean, self._spec.channels.std
        return columns


def sha256(data: bytes) -> bytes:
    """Return the SHA-256 of an image file's bytes, as ``source_sha256`` holds it."""
    return hashlib.sha256(data).digest()


def pwrite_all(descriptor: int, values: np.ndarray, offset: int) -> None:
    """Write an array's bytes at an offset, however many calls it takes."""
    view = memoryview(values.reshape(-1).view(np.uint8))
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
