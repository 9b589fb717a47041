"""Image keys to patch features, by positioned reads into the caller's buffer; knows nothing of HDF5.

A shard's header says where its bytes lie, so no HDF5 handle is ever open: nothing to lock, nothing to lose over a fork.

Shapes: B rows asked for, L tokens, D width (576 and 1024 for CLIP-L/14-336).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.cache.format import (
    QUANTISED,
    SHARDS,
    STORAGE_DTYPES,
    USER_BLOCK,
    Dataset,
    Header,
    decode_header,
    fingerprint_hash,
)
from llava_twophase.cache.index import KeyIndex
from llava_twophase.cache.manifest import Manifest, ShardEntry, read_manifest
from llava_twophase.errors import UserError

if TYPE_CHECKING:
    import torch

_OPEN_FILES = 64


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
        fingerprint = fingerprint_hash(self.fingerprint)
        self.headers = [_check_shard(self.path, entry, fingerprint) for entry in self.manifest.shards]
        first = self.headers[0]
        self.feature_shape, self.dtype = first.feature_shape, first.storage
        for entry, header in zip(self.manifest.shards, self.headers, strict=True):
            if header.feature_shape != self.feature_shape or header.storage != self.dtype:
                raise UserError(f"{entry.file} has other shapes or another dtype than {self.manifest.shards[0].file}")
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._owner = os.getpid()
        self.codec = Codec(self.dtype, self.feature_shape, self._channels())
        # For each part of a row: where it starts in each shard, its bytes.
        self._parts = [
            (np.array([header.row_parts[part].offset for header in self.headers]), data.row_bytes)
            for part, data in enumerate(first.row_parts)
        ]
        self._index = self._read_index()

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
        """Read rows into a new array.

        Args:
            keys: Image keys, in any order, repeated or not.

        Returns:
            As stored: ``[B, L, D]`` where storage is exact (uint16 bits for bfloat16), else ``uint8 [B, row_bytes]``.

        Raises:
            UserError: A key is not in the cache, or a file is shorter than it says.
        """
        buffer = np.empty((len(keys), self.codec.row_bytes), np.uint8)
        self.read_into(keys, buffer)
        if self.dtype in QUANTISED:
            return buffer
        return buffer.view(STORAGE_DTYPES[self.dtype]).reshape(-1, *self.feature_shape)

    def read_into(self, keys: Sequence[str], buffer: np.ndarray) -> None:
        """Read rows into the caller's memory, a pinned buffer for one.

        Args:
            keys: Image keys, in any order, repeated or not.
            buffer: C-contiguous, of ``len(keys) * codec.row_bytes`` bytes.

        Raises:
            UserError: A key is not in the cache, or a file is shorter than it says.
            ValueError: The buffer has another size, or numpy would have to copy it.
        """
        self.read_rows_into(self.rows(keys), buffer)

    def read_rows_into(self, rows: np.ndarray, buffer: np.ndarray) -> None:
        """Read rows whose numbers ``rows`` or ``find`` gave; as ``read_into`` otherwise."""
        row_bytes = self.codec.row_bytes
        if not buffer.flags.c_contiguous or buffer.nbytes != len(rows) * row_bytes:
            raise ValueError(f"the buffer must be C-contiguous and hold {len(rows)} rows of {row_bytes} bytes")
        view = memoryview(buffer.reshape(-1).view(np.uint8))
        shards = self._index.shards(rows)
        inside = rows - self._index.starts[shards]
        files = shards.tolist()
        begin = 0
        for starts, part_bytes in self._parts:
            offsets = (starts[shards] + inside * part_bytes).tolist()
            for position, (shard, offset) in enumerate(zip(files, offsets, strict=True)):
                at = position * row_bytes + begin
                self._pread(shard, view[at : at + part_bytes], offset)
            begin += part_bytes

    def tensor(self, keys: Sequence[str]) -> torch.Tensor:
        """Read features as a new tensor ``[B, L, D]``: in the storage dtype where it is exact, else float32."""
        import torch

        rows = torch.empty(len(keys), self.codec.row_bytes, dtype=torch.uint8)
        self.read_into(keys, rows.numpy())
        return self.codec.decode(rows)

    def values(self, keys: Sequence[str]) -> np.ndarray:
        """Read features as float32 ``[B, L, D]``, without torch."""
        buffer = np.empty((len(keys), self.codec.row_bytes), np.uint8)
        self.read_into(keys, buffer)
        return self.codec.to_numpy(buffer)

    def column(self, name: str) -> np.ndarray:
        """Read one of the per-row datasets of all shards, such as ``source_sha256``, in row order."""
        return np.concatenate([self._read_dataset(shard, name) for shard in range(len(self.headers))])

    def __reduce__(self) -> tuple[Any, ...]:
        """Be opened again where it is pickled, a spawned worker for one, instead of copying the index."""
        return type(self), self._arguments

    def close(self) -> None:
        """Close files; the next read opens them again."""
        self._files.clear()

    def _channels(self) -> Channels | None:
        if self.dtype not in QUANTISED:
            return None
        channels = Channels(self._read_dataset(0, "channel_mean"), self._read_dataset(0, "channel_std"))
        named = self.fingerprint.get("channels")
        if not isinstance(named, dict) or channels.sha256() != named.get("sha256"):
            raise UserError(f"{self.manifest.shards[0].file} has other channels than its fingerprint says")
        return channels

    def _read_index(self) -> KeyIndex:
        counts = [header.rows for header in self.headers]
        keys = [header.datasets["image_key"] for header in self.headers]
        names = np.empty(sum(data.nbytes for data in keys), np.uint8)
        hashes = np.empty(sum(counts), np.uint64)
        name_start = row = 0
        for shard, (header, data) in enumerate(zip(self.headers, keys, strict=True)):
            self._pread(shard, memoryview(names)[name_start : name_start + data.nbytes], data.offset)
            part = hashes[row : row + header.rows].view(np.uint8)
            self._pread(shard, memoryview(part), header.datasets["key_xxh3"].offset)
            name_start, row = name_start + data.nbytes, row + header.rows
        index = KeyIndex(names, hashes, counts, [data.row_bytes for data in keys])
        twin = index.twin()
        if twin is not None:
            raise UserError(f"image key {twin.decode('utf-8', 'replace')!r} stands twice in {self.path}")
        return index

    def _read_dataset(self, shard: int, name: str) -> np.ndarray:
        data: Dataset = self.headers[shard].datasets[name]
        raw = bytearray(data.nbytes)
        self._pread(shard, memoryview(raw), data.offset)
        return np.frombuffer(raw, data.numpy_dtype).reshape(data.shape)

    def _open_file(self, shard: int) -> _File:
        if self._owner != os.getpid():
            # A forked child opens its own.
            self._files, self._owner = OrderedDict(), os.getpid()
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = _File(self.path / SHARDS / self.manifest.shards[shard].file)
            while len(self._files) > _OPEN_FILES:
                with suppress(KeyError):  # another thread may just have emptied it
                    self._files.popitem(last=False)
        else:
            with suppress(KeyError):  # another thread may just have dropped it; it stays open while we hold it
                self._files.move_to_end(shard)
        return file

    def _pread(self, shard: int, view: memoryview, offset: int) -> None:
        opened = self._open_file(shard)
        while view:
            count = os.preadv(opened.descriptor, [view], offset)
            if count == 0:
                file = self.manifest.shards[shard].file
                raise UserError(f"{self.path / SHARDS / file} is truncated; delete it and extract it again")
            view, offset = view[count:], offset + count


class _File:
    # Closes with its last reference: were it closed when dropped from the cache's list, another thread's read could hit
    # whatever file was given the same descriptor.

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _text(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"image key {name!r} is not UTF-8: the cache is damaged; verify names the shard") from None


def check_shard(cache: Path, entry: ShardEntry, fingerprint: dict[str, Any]) -> Header:
    """Read a shard's header and hold it against the manifest.

    Args:
        cache: The cache's directory.
        entry: What the manifest says of the shard.
        fingerprint: The manifest's fingerprint.

    Returns:
        The header.

    Raises:
        UserError: The shard is missing, truncated, of another schema, or disagrees with the manifest.
    """
    return _check_shard(cache, entry, fingerprint_hash(fingerprint))


def _check_shard(cache: Path, entry: ShardEntry, fingerprint: str) -> Header:
    header = read_header(cache / SHARDS / entry.file)
    found = (header.rows, header.file_bytes, header.xxh3_128)
    if found != (entry.rows, entry.file_bytes, entry.xxh3_128):
        raise UserError(f"{entry.file} is not the shard that {cache / 'manifest.json'} lists: {found}, listed {entry}")
    if header.fingerprint != fingerprint:
        raise UserError(f"{entry.file} has another fingerprint than {cache / 'manifest.json'}: another cache's shard?")
    return header


def read_header(path: Path) -> Header:
    """Read a shard's header; the file must be as long as it says.

    Raises:
        UserError: The shard is missing, truncated, damaged, or of another schema.
    """
    try:
        with path.open("rb") as file:
            header = decode_header(file.read(USER_BLOCK), str(path))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if size != header.file_bytes:
        raise UserError(f"{path} is truncated or too long: {size} bytes, expected {header.file_bytes}")
    return header
