"""One shard, sealed by fsync and rename, or absent; knows nothing of images, towers or the manifest's other shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.cache.format import (
    ALIGNMENT,
    ENCODINGS,
    ROW_PARTS,
    SCHEMA,
    USER_BLOCK,
    Dataset,
    Header,
    canonical_json,
    fingerprint_hash,
    layout,
)
from llava_twophase.cache.manifest import ShardEntry, sync_folder
from llava_twophase.errors import UserError


@dataclass(frozen=True)
class ShardSpec:
    """What all shards of a cache share.

    Attributes:
        feature_shape: Tokens and width of one row.
        storage_dtype: A key of ``STORAGE_DTYPES``.
        fingerprint: What changes a feature value.
        provenance: What is recorded; free of hosts and dates, so that equal work gives equal bytes.
        channels: For int8 and int4.
    """

    feature_shape: tuple[int, int]
    storage_dtype: str
    fingerprint: dict[str, Any]
    provenance: dict[str, Any]

    channels: Channels | None = None

    @property
    def codec(self) -> Codec:
        """What makes stored rows of features."""
        return Codec(self.storage_dtype, self.feature_shape, self.channels)

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one image's features."""
        return self.codec.row_bytes


class ShardWriter:
    """Writes the rows of one shard in order, then seals it.

    HDF5 lays out the file once, empty; every value is then written at its offset, so that a kill leaves nothing that
    looks like a shard, and equal rows give an equal file byte for byte.

    Args:
        path: The sealed file's path; the work file beside it ends in ``.tmp``.
        keys: Image keys, one for each row to come.
        spec: What all shards share.
    """

    def __init__(self, path: Path, keys: Sequence[str], spec: ShardSpec) -> None:
        self.path, self._spec, self._codec = path, spec, spec.codec
        self._aside = path.with_name(f"{path.name}.tmp")
        self._datasets = _lay_out(self._aside, keys, spec)
        self._descriptor = os.open(self._aside, os.O_RDWR)
        self._keys = list(keys)
        encoded = [key.encode("utf-8") for key in keys]
        self._columns = {
            name: np.zeros(data.shape, data.numpy_dtype)
            for name, data in self._datasets.items()
            if name not in ROW_PARTS
        }
        self._columns["image_key"][:] = encoded
        self._columns["key_xxh3"][:] = [xxhash.xxh3_64_intdigest(key) for key in encoded]
        if spec.channels is not None:
            self._columns["channel_mean"][:] = spec.channels.mean
            self._columns["channel_std"][:] = spec.channels.std
        self._written = 0

    def append(self, rows: np.ndarray, sources: Sequence[tuple[int, bytes]]) -> None:
        """Write the next rows.

        Args:
            rows: Stored rows ``uint8 [B, row_bytes]``, as ``Codec.encode`` makes them; or, the same bytes, values
                ``[B, L, D]`` of exact storage.
            sources: Size in bytes and SHA-256 of each image file.

        Raises:
            UserError: Values that are not finite, by image; nothing of this shard is kept.
        """
        rows = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
        assert rows.shape[1] == self._codec.row_bytes
        first, last = self._written, self._written + len(rows)
        finite = self._codec.finite(rows)
        if not finite.all():
            bad = [self._keys[first + row] for row in np.flatnonzero(~finite)]
            raise UserError(
                f"the tower's features of {bad[:5]} are not finite; try --compute_dtype bf16 or fp32 "
                "(fp16 overflows above 65504)"
            )
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
        """Write the columns and the header, sync, rename, sync the folder.

        Returns:
            The shard's entry for the manifest.
        """
        if self._written != len(self._keys):
            raise ValueError(f"{self.path.name} has {self._written} of {len(self._keys)} rows")
        for name, values in self._columns.items():
            pwrite_all(self._descriptor, values, self._datasets[name].offset)
        size = os.fstat(self._descriptor).st_size
        header = Header(self._spec.storage_dtype, fingerprint_hash(self._spec.fingerprint), size, self._datasets, "")
        digest = hash_around(self._descriptor, header)
        header = replace(header, xxh3_128=digest)
        pwrite_all(self._descriptor, np.frombuffer(header.encode(), np.uint8), 0)
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._aside.replace(self.path)
        sync_folder(self.path.parent)
        return ShardEntry(self.path.name, header.rows, size, digest)

    def discard(self) -> None:
        """Give up: close and remove the work file."""
        os.close(self._descriptor)
        self._aside.unlink(missing_ok=True)


def hash_around(descriptor: int, header: Header) -> str:
    """Return the XXH3-128 (hex) of a shard's bytes behind the user block but those of its rows' features."""
    digest = xxhash.xxh3_128()
    position = USER_BLOCK
    for part in sorted(header.row_parts, key=lambda data: data.offset):
        _hash_range(digest, descriptor, position, part.offset)
        position = part.offset + part.nbytes
    _hash_range(digest, descriptor, position, header.file_bytes)
    return digest.hexdigest()


def _hash_range(digest: Any, descriptor: int, start: int, stop: int) -> None:
    for position in range(start, stop, 1 << 20):
        digest.update(os.pread(descriptor, min(1 << 20, stop - position), position))


def sha256(data: bytes) -> bytes:
    """Return the SHA-256 of an image file's bytes, as ``source_sha256`` holds it."""
    return hashlib.sha256(data).digest()


def pwrite_all(descriptor: int, values: np.ndarray, offset: int) -> None:
    """Write an array's bytes at an offset, however many calls it takes."""
    view = memoryview(values.reshape(-1).view(np.uint8))
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def hdf5_type(name: str, dtype: str) -> h5py.h5t.TypeID:
    """Return the HDF5 datatype of a dataset, by its name and its dtype in the header.

    h5py has no bfloat16; the custom float made here equals HDF5 2.0's ``H5T_FLOAT_BFLOAT16LE``, and older tools read
    it as any float.
    """
    if name == "image_key":
        return h5py.h5t.py_create(h5py.string_dtype("utf-8", np.dtype(dtype).itemsize), logical=True)
    if dtype != "bfloat16":
        return h5py.h5t.py_create(np.dtype(dtype))
    bfloat16 = h5py.h5t.IEEE_F16LE.copy()
    bfloat16.set_fields(15, 7, 8, 0, 7)
    bfloat16.set_ebias(127)
    return bfloat16


def _lay_out(path: Path, keys: Sequence[str], spec: ShardSpec) -> dict[str, Dataset]:
    key_bytes = max(len(key.encode("utf-8")) for key in keys)
    datasets = {}
    with h5py.File(
        path, "w", libver="earliest", userblock_size=USER_BLOCK, alignment_threshold=1, alignment_interval=ALIGNMENT
    ) as file:
        file.attrs["schema"] = SCHEMA
        file.attrs["fingerprint"] = canonical_json(spec.fingerprint)
        file.attrs["provenance"] = canonical_json(spec.provenance)
        for name, (dtype, shape) in layout(spec.storage_dtype, len(keys), spec.feature_shape, key_bytes).items():
            datasets[name] = Dataset(dtype, shape, _create(file, name, shape, hdf5_type(name, dtype)))
        file["features"].attrs["encoding"] = ENCODINGS[spec.storage_dtype]
    return datasets


def _create(file: h5py.File, name: str, shape: tuple[int, ...], hdf5: h5py.h5t.TypeID) -> int:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    return int(h5py.h5d.create(file.id, name.encode(), hdf5, space, properties).get_offset())
