"""A whole cache against its checksums, its manifest and its format; knows nothing of images or towers.

Everything is read once, some rows at a time. Nothing a cache says of itself is believed before it is checked: sizes are
bounded by the file's real size, and nothing outside the cache's directory is opened.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from llava_twophase.cache.check.hdf5_process import Hdf5Checker
from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.cache.format import (
    MANIFEST,
    QUANTISED,
    QUARANTINE,
    ROW_PARTS,
    SHARDS,
    USER_BLOCK,
    Header,
    StoredDataset,
    decode_header,
    fingerprint_hash,
)
from llava_twophase.cache.manifest import Manifest, ShardEntry, read_manifest
from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.cache.shard_files import checksum_around
from llava_twophase.errors import UserError
from llava_twophase.records import normalize_key

_BATCH_ROWS = 64
_BATCH_BYTES = 8 << 20
# Nothing that is read at once may be larger: no writer comes near, and a sparse file can claim any size.
_LIMIT = 1 << 30

_AGAIN = "delete it and run the same extraction command again, or copy it again from an intact cache"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a cache.

    Attributes:
        file: The file, relative to the cache.
        what: What is wrong.
        fix: What to do.
        note: It does no harm.
    """

    file: str
    what: str
    fix: str
    note: bool = False


def verify(path: str | Path, hdf5: Hdf5Checker | None = None) -> list[Problem]:
    """Check every bit of a cache; a progress bar goes to stderr where that is a terminal.

    Args:
        path: The cache's directory.
        hdf5: Looks at HDF5 metadata in another process; give one where many small caches are verified.

    Returns:
        The problems found, and notes; empty where all is well.

    Raises:
        UserError: There is no such directory.
    """
    cache = Path(path)
    if not cache.is_dir():
        raise UserError(f"{path} is not a folder; expected a feature cache, with {MANIFEST} and {SHARDS}/")
    if not _inside(cache, cache / MANIFEST):
        return [_outside(MANIFEST)]
    try:
        manifest = read_manifest(cache)
    except UserError as error:
        return [Problem(MANIFEST, str(error), "if it is damaged, copy it again from an intact cache")]
    with nullcontext(hdf5) if hdf5 else Hdf5Checker() as checker:
        verifier = _Verifier(cache, manifest, checker)
        return [*verifier.folder(), *verifier.shards(), *verifier.twins()]


def verify_shards(cache: Path, manifest: Manifest, hdf5: Hdf5Checker) -> list[Problem]:
    """Check the shards that are there of a manifest that need not be the one on disk; as ``verify`` otherwise."""
    verifier = _Verifier(cache, manifest, hdf5)
    found = {entry.file for entry in manifest.shards if (cache / SHARDS / entry.file).exists()}
    verifier.present = [entry for entry in manifest.shards if entry.file in found]
    return [*verifier.shards(), *verifier.twins()]


class _Verifier:
    # The checks of one run, and what they have to remember from one shard to the next.

    def __init__(self, cache: Path, manifest: Manifest, hdf5: Hdf5Checker) -> None:
        self._cache, self._manifest, self._hdf5 = cache, manifest, hdf5
        self._fingerprint = fingerprint_hash(manifest.fingerprint)
        self.present: list[ShardEntry] = []
        self._row_kind: tuple[str, Any] | None = None
        self._keys: list[tuple[str, np.ndarray, np.ndarray]] = []

    def folder(self) -> Iterator[Problem]:
        """Hold the directory against the manifest."""
        complete, shards = self._manifest.complete, self._manifest.shards
        if not complete:
            yield Problem(MANIFEST, "the extraction was cut, or is under way", "run the same extraction command again")
        elif not shards:
            yield Problem(MANIFEST, "it lists no shards", "extract the features again")
        if not _inside(self._cache, self._cache / QUARANTINE):
            yield _outside(QUARANTINE)
        else:
            try:
                read_quarantine(self._cache)
            except UserError as error:
                yield Problem(QUARANTINE, str(error), "or copy it again from an intact cache")
        if not _inside(self._cache, self._cache / SHARDS):
            yield _outside(SHARDS)
            return
        try:
            found = sorted(os.listdir(self._cache / SHARDS))
        except OSError as error:
            yield Problem(SHARDS, f"it cannot be read: {error.strerror}", "copy the cache again from an intact one")
            return
        listed = Counter(entry.file for entry in shards)
        for name in found:
            if name.endswith(".tmp"):
                yield Problem(f"{SHARDS}/{name}", "a work file, left by a cut extraction", "delete it", note=True)
            elif name.endswith(".h5") and name not in listed:
                fix = "move it elsewhere" if complete else "run the same extraction command again, which takes it in"
                yield Problem(f"{SHARDS}/{name}", f"it is extra: {MANIFEST} does not list it", fix, note=not complete)
        for name, times in listed.items():
            if times > 1:
                yield Problem(MANIFEST, f"it lists {name} {times} times", "copy it again from an intact cache")
            if name not in found:
                yield Problem(f"{SHARDS}/{name}", "it is missing", _AGAIN.removeprefix("delete it and "))
        self.present = [entry for entry in {entry.file: entry for entry in shards}.values() if entry.file in found]

    def shards(self) -> Iterator[Problem]:
        """Check all shards that are there."""
        total = sum(entry.file_bytes for entry in self.present)
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
            for entry in self.present:
                path, name = self._cache / SHARDS / entry.file, f"{SHARDS}/{entry.file}"
                if not _inside(self._cache, path):
                    yield _outside(name)
                    continue
                try:
                    # Without O_NONBLOCK, opening a named pipe would wait for its writer for good.
                    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", 0) as file:
                        found = self._shard(entry, path, file.fileno(), bar)
                        yield from (Problem(name, what, _AGAIN) for what in found)
                except OSError as error:
                    yield Problem(name, f"it cannot be read: {error.strerror or error}", _AGAIN)
                except UserError as error:
                    yield Problem(name, str(error), f"if it is damaged, {_AGAIN}")

    def twins(self) -> Iterator[Problem]:
        """Find image keys that stand more than once, whatever the shard."""
        if not self._keys:
            return
        starts = np.cumsum([0, *(len(names) for _, names, _ in self._keys)])
        hashes = np.concatenate([hashes for _, _, hashes in self._keys])
        order = np.argsort(hashes, kind="stable")
        equal = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        seen: dict[bytes, str] = {}
        for row in np.union1d(order[equal], order[equal + 1]):
            shard = int(np.searchsorted(starts, row, side="right")) - 1
            file, names, _ = self._keys[shard]
            key = bytes(names[row - starts[shard]])
            if key in seen:
                yield Problem(f"{SHARDS}/{file}", f"image key {_shown(key)} stands again, after {seen[key]}", _AGAIN)
            seen[key] = file

    def _shard(self, entry: ShardEntry, path: Path, descriptor: int, bar: tqdm[Any]) -> Iterator[str]:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        if status.st_size < entry.file_bytes:
            yield f"it is truncated: {status.st_size} bytes, the manifest says {entry.file_bytes}"
            return
        header = decode_header(block := os.pread(descriptor, USER_BLOCK, 0), "it")
        yield from self._header(entry, header, block)
        if status.st_size != header.file_bytes:
            yield f"it is truncated or too long: {status.st_size} bytes, its header says {header.file_bytes}"
            return
        row_bytes = sum(data.row_bytes for data in header.row_parts)
        columns = [data.nbytes for name, data in header.datasets.items() if name not in ROW_PARTS]
        if max(row_bytes, *columns) > _LIMIT:
            yield f"it claims absurd sizes: {header.rows} rows of {row_bytes} bytes"
            return
        if checksum_around(descriptor, header) != header.xxh3_128:
            yield "its bytes around the features do not match their checksum: metadata, keys or row checksums changed"
            return
        bar.update(header.file_bytes - header.rows * row_bytes)
        yield from self._hdf5.check(path)
        names = _read_column(descriptor, header.datasets["image_key"])
        hashes = np.array([xxhash.xxh3_64_intdigest(bytes(name)) for name in names], np.uint64)
        self._keys.append((entry.file, names, hashes))
        stored = _read_column(descriptor, header.datasets["key_xxh3"])
        yield from (f"key_xxh3 of {_shown(names[row])} is not its hash" for row in np.flatnonzero(hashes != stored))
        yield from (f"image key {_shown(name)} is no relative UTF-8 path" for name in names if not _is_key(bytes(name)))
        channels = None
        if header.storage in QUANTISED:
            channels = Channels(*(_read_column(descriptor, header.datasets[f"channel_{n}"]) for n in ("mean", "std")))
            named = self._manifest.fingerprint.get("channels")
            if not isinstance(named, dict) or named.get("sha256") != channels.sha256():
                yield "its channel_mean and channel_std are not those of the fingerprint"
        codec = Codec(header.storage, header.feature_shape, channels)
        yield from _rows(descriptor, header, codec, names, bar)

    def _header(self, entry: ShardEntry, header: Header, block: bytes) -> Iterator[str]:
        try:
            canonical = header.to_bytes()
        except ValueError:
            canonical = b""
        if canonical != block:
            yield "its header is not in canonical form: bytes of it changed, or it was made by something else"
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


def _rows(descriptor: int, header: Header, codec: Codec, names: np.ndarray, bar: tqdm[Any]) -> Iterator[str]:
    checksums = _read_column(descriptor, header.datasets["row_xxh3"])
    batch = max(1, min(_BATCH_ROWS, header.rows, _BATCH_BYTES // codec.row_bytes))
    buffers = [np.empty((batch, part.row_bytes), np.uint8) for part in header.row_parts]
    for first in range(0, header.rows, batch):
        parts = [buffer[: header.rows - first] for buffer in buffers]
        for part, raw in zip(header.row_parts, parts, strict=True):
            _read_into(descriptor, raw, part.offset + first * part.row_bytes)
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)  # [B, row_bytes]
        finite = codec.finite(rows)
        for row, stored in enumerate(rows):
            if xxhash.xxh3_64_intdigest(stored) != int(checksums[first + row]):
                yield f"the features of {_shown(names[first + row])} do not match their checksum"
            elif not finite[row]:
                yield f"the features of {_shown(names[first + row])} are not finite"
        bar.update(rows.nbytes)


def _read_column(descriptor: int, data: StoredDataset) -> np.ndarray:
    raw = np.empty(data.nbytes, np.uint8)
    _read_into(descriptor, raw, data.offset)
    return raw.view(data.numpy_dtype).reshape(data.shape)


def _read_into(descriptor: int, values: np.ndarray, offset: int) -> None:
    view = memoryview(values.reshape(-1))
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise OSError("it became shorter while it was read")
        view, offset = view[count:], offset + count


def _is_key(name: bytes) -> bool:
    try:
        return normalize_key(name.decode("utf-8")) == name.decode("utf-8")
    except ValueError:  # of which UserError is one
        return False


def _shown(name: bytes) -> str:
    return repr(bytes(name).decode("utf-8", "backslashreplace"))


def _inside(cache: Path, path: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(cache))


def _outside(name: str) -> Problem:
    return Problem(name, "it is a link that leaves the cache's folder", "copy what it points to into its place")
