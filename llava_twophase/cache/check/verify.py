"""Verify a cache: compare every byte with its checksums, its manifest and its format.

All files are read once, a few rows at a time. What a file states about itself is checked before it is used: sizes are
bounded by the real size of the file, and nothing outside the cache's directory is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from llava_twophase.cache.check.duplicates import ShardKeys, duplicate_keys
from llava_twophase.cache.check.files import (
    AGAIN,
    COPY,
    Problem,
    folder_problems,
    inside,
    manifest_problems,
    outside,
    quarantine_problems,
)
from llava_twophase.cache.check.hdf5_process import Hdf5Checker
from llava_twophase.cache.check.metadata_copy import local_metadata
from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.cache.format import MANIFEST, QUANTISED, ROW_PARTS, SHARDS, fingerprint_hash
from llava_twophase.cache.header import Header, decode_header
from llava_twophase.cache.local import LocalStorage
from llava_twophase.cache.manifest import Manifest, ShardEntry, read_manifest
from llava_twophase.cache.shard import Shard
from llava_twophase.cache.storage import Storage, open_storage
from llava_twophase.errors import UserError
from llava_twophase.records import normalize_key

_BATCH_ROWS = 64
_BATCH_BYTES = 8 << 20
# Largest dataset or row that is read at once. No writer comes near it, and a sparse file can state any size.
_LIMIT = 1 << 30


def verify(path: str | Path, hdf5: Hdf5Checker | None = None) -> list[Problem]:
    """Check every bit of a cache. A progress bar is shown if stderr is a terminal.

    Args:
        path: The cache's directory or URL.
        hdf5: Process that checks HDF5 metadata; pass one to verify many small caches without starting one for each.

    Returns:
        Problems and notes; empty for an intact cache.

    Raises:
        UserError: There is no such directory.
    """
    storage = open_storage(path)
    cache = storage.folder
    if cache is None:
        return _verify_remote(storage, hdf5)
    if not cache.is_dir():
        raise UserError(f"{path} is not a folder; expected a feature cache, with {MANIFEST} and {SHARDS}/")
    if not inside(cache, cache / MANIFEST):
        return [outside(MANIFEST)]
    try:
        manifest = read_manifest(cache)
    except UserError as error:
        return [Problem(MANIFEST, str(error), f"if it is damaged, {COPY}")]
    with nullcontext(hdf5) if hdf5 else Hdf5Checker() as checker:
        problems = list(folder_problems(cache, manifest))
        present = [entry for entry in _unique(manifest) if _present(cache, entry)]
        return [*problems, *_Verifier(storage, manifest, checker).shards(present)]


def verify_shards(cache: Path, manifest: Manifest, hdf5: Hdf5Checker) -> list[Problem]:
    """Check the shards that exist, as ``verify`` does, against a manifest that need not be the one on disk."""
    present = [entry for entry in manifest.shards if (cache / SHARDS / entry.file).exists()]
    return list(_Verifier(LocalStorage(cache), manifest, hdf5).shards(present))


def _verify_remote(storage: Storage, hdf5: Hdf5Checker | None) -> list[Problem]:
    # Without a list of the files, a file that the manifest does not list is not reported.
    manifest = read_manifest(storage)
    storage.will_open([entry.file for entry in _unique(manifest)])
    with nullcontext(hdf5) if hdf5 else Hdf5Checker() as checker:
        shards = _Verifier(storage, manifest, checker).shards(_unique(manifest))
        return [*manifest_problems(manifest), *quarantine_problems(storage), *shards]


class _Verifier:
    # Checks shards one after another, and keeps what must agree between them.

    def __init__(self, storage: Storage, manifest: Manifest, hdf5: Hdf5Checker) -> None:
        self._storage = storage
        self._manifest = manifest
        self._hdf5 = hdf5
        self._fingerprint = fingerprint_hash(manifest.fingerprint)
        self._row_kind: tuple[str, Any] | None = None
        self._keys: list[ShardKeys] = []

    def shards(self, entries: list[ShardEntry]) -> Iterator[Problem]:
        """Check shards, and that no key occurs twice in them."""
        total = sum(entry.file_bytes for entry in entries)
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
            for entry in entries:
                name, folder = f"{SHARDS}/{entry.file}", self._storage.folder
                if folder is not None and not inside(folder, folder / name):
                    yield outside(name)
                    continue
                fix = f"delete it and {AGAIN}"
                try:
                    yield from (Problem(name, what, fix) for what in self._shard(entry, bar))
                except OSError as error:
                    yield Problem(name, f"it cannot be read: {error.strerror or error}", fix)
                except UserError as error:
                    yield Problem(name, str(error).replace(f"{self._storage}/{name}", "it"), f"if it is damaged, {fix}")
        for key, first, file in duplicate_keys(self._keys):
            what = f"image key {_shown(key)} is listed again, after {first}"
            yield Problem(f"{SHARDS}/{file}", what, f"delete it and {AGAIN}")

    def _shard(self, entry: ShardEntry, bar: tqdm[Any]) -> Iterator[str]:
        file = self._storage.open_shard(entry.file)
        block = file.header_block()
        if file.size < entry.file_bytes:
            yield f"it is truncated: {file.size} bytes, the manifest states {entry.file_bytes}"
            return
        header = decode_header(block, "it")
        yield from self._header_problems(entry, header, block)
        unreadable = _unreadable(file, header)
        if unreadable is not None:
            yield unreadable
            return
        bar.update(header.file_bytes - sum(part.nbytes for part in header.row_parts))
        with local_metadata(file, header) as path:
            yield from self._hdf5.check(path)
        keys = self._read_keys(entry, file, header)
        yield from _key_problems(file, header, keys)
        channels = _read_channels(file, header)
        if channels is not None:
            expected = self._manifest.fingerprint.get("channels")
            if not isinstance(expected, dict) or expected.get("sha256") != channels.sha256():
                yield "its channel_mean and channel_std are not those of the fingerprint"
        codec = Codec(header.storage, header.feature_shape, channels)
        yield from _row_problems(file, header, codec, keys.names, bar)

    def _header_problems(self, entry: ShardEntry, header: Header, block: bytes) -> Iterator[str]:
        try:
            canonical = header.to_bytes()
        except ValueError:
            canonical = b""
        if canonical != block:
            yield "its header is not in canonical form: bytes of it changed, or other software wrote it"
        for name in ("rows", "file_bytes", "xxh3_128"):
            listed, found = getattr(entry, name), getattr(header, name)
            if listed != found:
                yield f"{name} is {found} in its header, but {listed} in {MANIFEST}"
        if header.fingerprint != self._fingerprint:
            yield f"its fingerprint is not the one of {MANIFEST}: it belongs to another cache"
        row_kind = (header.storage, header.feature_shape)
        self._row_kind = self._row_kind or row_kind
        if row_kind != self._row_kind:
            yield f"its rows are {row_kind}, but {self._row_kind} in the first shard"

    def _read_keys(self, entry: ShardEntry, file: Shard, header: Header) -> ShardKeys:
        names = file.read_dataset(header.datasets["image_key"])
        hashes = np.array([xxhash.xxh3_64_intdigest(bytes(name)) for name in names], np.uint64)
        self._keys.append(ShardKeys(entry.file, names, hashes))
        return self._keys[-1]


def _unreadable(file: Shard, header: Header) -> str | None:
    # Why the values of a shard cannot be read.
    if file.size != header.file_bytes:
        return f"it is truncated or too long: {file.size} bytes, its header states {header.file_bytes}"
    row_bytes = sum(data.row_bytes for data in header.row_parts)
    columns = [data.nbytes for name, data in header.datasets.items() if name not in ROW_PARTS]
    if max(row_bytes, *columns) > _LIMIT:
        return f"it states absurd sizes: {header.rows} rows of {row_bytes} bytes"
    if file.checksum_around(header) != header.xxh3_128:
        return "its bytes around the features do not match their checksum: metadata, keys or row checksums changed"
    return None


def _key_problems(file: Shard, header: Header, keys: ShardKeys) -> Iterator[str]:
    stored = file.read_dataset(header.datasets["key_xxh3"])
    for row in np.flatnonzero(keys.hashes != stored):
        yield f"key_xxh3 of {_shown(keys.names[row])} is not its hash"
    for name in keys.names:
        if not _is_key(bytes(name)):
            yield f"image key {_shown(name)} is not a relative UTF-8 path"


def _read_channels(file: Shard, header: Header) -> Channels | None:
    if header.storage not in QUANTISED:
        return None
    return Channels(*(file.read_dataset(header.datasets[f"channel_{name}"]) for name in ("mean", "std")))


def _row_problems(file: Shard, header: Header, codec: Codec, names: np.ndarray, bar: tqdm[Any]) -> Iterator[str]:
    checksums = file.read_dataset(header.datasets["row_xxh3"])
    batch = max(1, min(_BATCH_ROWS, header.rows, _BATCH_BYTES // codec.row_bytes))
    buffer = np.empty((batch, codec.row_bytes), np.uint8)
    for first in range(0, header.rows, batch):
        rows = buffer[: header.rows - first]  # [B, row_bytes]
        file.read_rows_into(header, first, rows)
        finite = codec.finite(rows)
        for row, stored in enumerate(rows):
            if xxhash.xxh3_64_intdigest(stored) != int(checksums[first + row]):
                yield f"the features of {_shown(names[first + row])} do not match their checksum"
            elif not finite[row]:
                yield f"the features of {_shown(names[first + row])} are not finite"
        bar.update(rows.nbytes)


def _unique(manifest: Manifest) -> list[ShardEntry]:
    return list({entry.file: entry for entry in manifest.shards}.values())


def _present(cache: Path, entry: ShardEntry) -> bool:
    return inside(cache, cache / SHARDS) and os.path.lexists(cache / SHARDS / entry.file)


def _is_key(name: bytes) -> bool:
    try:
        return normalize_key(name.decode("utf-8")) == name.decode("utf-8")
    except ValueError:  # includes UserError
        return False


def _shown(name: bytes) -> str:
    return repr(bytes(name).decode("utf-8", "backslashreplace"))
