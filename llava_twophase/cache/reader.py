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
import xxhash

from llava_twophase.cache.codec import from_stored
from llava_twophase.cache.format import SHARDS, STORAGE_DTYPES, USER_BLOCK, Header, decode_header, fingerprint_hash
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

    Raises:
        UserError: There is no cache, it is incomplete or damaged, or has another format version.
    """

    def __init__(self, path: str | Path, allow_incomplete: bool = False, manifest: Manifest | None = None) -> None:
        self.path = Path(path)
        self.manifest = manifest or read_manifest(self.path)
        if not self.manifest.complete and not allow_incomplete:
            raise UserError(f"{path} is incomplete: its extraction was cut; run the same extraction command again")
        if not self.manifest.shards:
            raise UserError(f"{path} holds no features")
        self.headers = [self._open_header(entry) for entry in self.manifest.shards]
        features = self.headers[0].datasets["features"]
        self.feature_shape: tuple[int, int] = (features.shape[1], features.shape[2])
        self.dtype = self.headers[0].storage_dtype
        self._row_bytes = features.nbytes // features.shape[0]
        for entry, header in zip(self.manifest.shards, self.headers, strict=True):
            if header.datasets["features"].shape[1:] != features.shape[1:] or header.storage_dtype != self.dtype:
                raise UserError(f"{entry.file} has other shapes or another dtype than {self.manifest.shards[0].file}")
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._owner = os.getpid()
        self._index()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that changes a feature value."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self._starts[-1])

    def __contains__(self, key: object) -> bool:
        """Tell whether an image's features are here."""
        return isinstance(key, str) and self._find(key) is not None

    def keys(self) -> Iterator[str]:
        """Iterate over image keys in row order."""
        for names in self._names:
            for name in names:
                yield _text(name)

    def read(self, keys: Sequence[str]) -> np.ndarray:
        """Read rows into a new array.

        Args:
            keys: Image keys, in any order, repeated or not.

        Returns:
            ``[B, L, D]`` as stored; uint16 bits for bfloat16.

        Raises:
            UserError: A key is not in the cache, or a file is shorter than it says.
        """
        buffer = np.empty((len(keys), *self.feature_shape), STORAGE_DTYPES[self.dtype])
        self.read_into(keys, buffer)
        return buffer

    def read_into(self, keys: Sequence[str], buffer: np.ndarray) -> None:
        """Read rows into the caller's memory, a pinned buffer for one.

        Args:
            keys: Image keys, in any order, repeated or not.
            buffer: C-contiguous ``[B, L, D]`` with the stored itemsize.

        Raises:
            UserError: A key is not in the cache, or a file is shorter than it says.
            ValueError: The buffer has another size, or numpy would have to copy it.
        """
        if not buffer.flags.c_contiguous or buffer.nbytes != len(keys) * self._row_bytes:
            raise ValueError(f"the buffer must be C-contiguous and hold {len(keys)} rows of {self._row_bytes} bytes")
        rows = buffer.reshape(-1).view(np.uint8).reshape(len(keys), self._row_bytes)
        for key, row in zip(keys, rows, strict=True):
            found = self._find(key)
            if found is None:
                raise UserError(f"image key {key!r} is not in the feature cache {self.path}")
            shard, position = found
            offset = self.headers[shard].datasets["features"].offset + position * self._row_bytes
            self._pread(shard, memoryview(row), offset)

    def tensor(self, keys: Sequence[str]) -> torch.Tensor:
        """Read rows as a new tensor ``[B, L, D]`` in the storage dtype."""
        return from_stored(self.read(keys), self.dtype)

    def column(self, name: str) -> np.ndarray:
        """Read one of the per-row datasets of all shards, such as ``source_sha256``, in row order."""
        return np.concatenate([self._read_column(shard, name) for shard in range(len(self.headers))])

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind when pickled."""
        return {**self.__dict__, "_files": OrderedDict()}

    def close(self) -> None:
        """Close files; the next read opens them again."""
        self._files.clear()

    def _index(self) -> None:
        # Sorted key hashes point at rows: arrays only, no Python object for each image.
        self._names = [self._read_column(shard, "image_key") for shard in range(len(self.headers))]
        hashes = self.column("key_xxh3")
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]
        self._starts = np.cumsum([0, *(header.rows for header in self.headers)])
        twins = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        for first in twins:
            key = self._name(int(self._order[first]))
            if key == self._name(int(self._order[first + 1])):
                raise UserError(f"image key {key.decode('utf-8', 'replace')!r} stands twice in {self.path}")

    def _find(self, key: str) -> tuple[int, int] | None:
        name = key.encode("utf-8", "surrogatepass")
        digest = np.uint64(xxhash.xxh3_64_intdigest(name))
        position = int(np.searchsorted(self._hashes, digest))
        while position < len(self._hashes) and self._hashes[position] == digest:
            row = int(self._order[position])
            if self._name(row) == name:
                shard = int(np.searchsorted(self._starts, row, side="right")) - 1
                return shard, row - int(self._starts[shard])
            position += 1
        return None

    def _name(self, row: int) -> bytes:
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return bytes(self._names[shard][row - self._starts[shard]])

    def _read_column(self, shard: int, name: str) -> np.ndarray:
        data = self.headers[shard].datasets[name]
        raw = bytearray(data.nbytes)
        self._pread(shard, memoryview(raw), data.offset)
        return np.frombuffer(raw, data.numpy_dtype).reshape(data.shape)

    def _open_header(self, entry: ShardEntry) -> Header:
        return check_shard(self.path, entry, self.manifest.fingerprint)

    def _open_file(self, shard: int) -> _File:
        if self._owner != os.getpid():
            # A forked child opens its own.
            self._files, self._owner = OrderedDict(), os.getpid()
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = _File(self.path / SHARDS / self.manifest.shards[shard].file)
            while len(self._files) > _OPEN_FILES:
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
    header = read_header(cache / SHARDS / entry.file)
    found = (header.rows, header.file_bytes, header.xxh3_128)
    if found != (entry.rows, entry.file_bytes, entry.xxh3_128):
        raise UserError(f"{entry.file} is not the shard that {cache / 'manifest.json'} lists: {found}, listed {entry}")
    if header.fingerprint != fingerprint_hash(fingerprint):
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
