"""Open the shards of a cache: their headers, the index of their keys, and the checksums of their rows.

For a large cache, index and checksums are kept in a file in ``~/.cache/llava-twophase/keys``, which all processes of a
machine map. The file's name is the SHA-256 of the shards' checksums, and it is made only from shards that match theirs.
A row is compared with the checksum beside its key, so a file of another cache gives errors and never a wrong row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from llava_twophase.cache.format import fingerprint_hash
from llava_twophase.cache.header import Header
from llava_twophase.cache.key_index import KeyIndex, index_arrays
from llava_twophase.cache.manifest import Manifest
from llava_twophase.cache.shard_files import ShardFiles
from llava_twophase.errors import UserError
from llava_twophase.shared_arrays import shared_arrays, user_cache

SHARED_FROM = 2_000_000
"""Keys from which on the index is kept in a file. Below, an index is made in less time than it takes to notice."""


@dataclass(frozen=True)
class OpenedShards:
    """What a reader keeps about the shards of a cache.

    Attributes:
        headers: Their headers.
        index: The rows by image key.
        checksums: ``uint64 [rows]``, the XXH3-64 of each row; None if they are not read yet.
    """

    headers: list[Header]
    index: KeyIndex
    checksums: np.ndarray | None


def open_shards(files: ShardFiles, manifest: Manifest, with_checksums: bool, share: bool) -> OpenedShards:
    """Read the headers of all shards, and their keys unless a file has the index.

    Args:
        files: The shards.
        manifest: The manifest.
        with_checksums: Whether to read the checksums of rows together with the keys.
        share: Whether the index of a large cache is kept in a file.

    Raises:
        UserError: A shard is missing, truncated or differs from the manifest, or a key occurs twice. For an index that
            is kept: the keys of a shard do not match its checksum.
    """
    if not (share and manifest.rows >= SHARED_FROM):
        read = _read_shards(files, manifest, with_checksums)
        return _opened(read.headers, read.arrays())
    made: list[Header] = []

    def make() -> Mapping[str, np.ndarray]:
        read = _read_shards(files, manifest, with_checksums=True, verify=True)
        made.extend(read.headers)
        return read.arrays()

    arrays = shared_arrays(user_cache("keys") / f"{_identity(manifest)}.arrays", make)
    return _opened(made or _read_headers(files, manifest), arrays)


@dataclass
class _Read:
    # Headers and columns of all shards.
    headers: list[Header] = field(default_factory=list)
    names: bytearray = field(default_factory=bytearray)
    hashes: bytearray = field(default_factory=bytearray)
    checksums: bytearray = field(default_factory=bytearray)

    def arrays(self) -> dict[str, np.ndarray]:
        widths = [header.datasets["image_key"].row_bytes for header in self.headers]
        arrays = index_arrays(self.names, widths, [header.rows for header in self.headers], self.hashes)
        return {**arrays, "checksums": np.frombuffer(self.checksums, np.uint64)} if self.checksums else arrays


def _read_shards(files: ShardFiles, manifest: Manifest, with_checksums: bool, verify: bool = False) -> _Read:
    # Opens each file once.
    files.will_open_all()
    read = _Read()
    for shard, header in enumerate(_headers(files, manifest)):
        read.headers.append(header)
        file = files.open(shard)
        if verify and file.checksum_around(header) != header.xxh3_128:
            raise UserError(
                f"{file.path} does not match its checksum; llava-inspect-cache verify reports what is damaged"
            )
        read.names += file.read_bytes(header.datasets["image_key"])
        read.hashes += file.read_bytes(header.datasets["key_xxh3"])
        if with_checksums:
            read.checksums += file.read_bytes(header.datasets["row_xxh3"])
    return read


def _read_headers(files: ShardFiles, manifest: Manifest) -> list[Header]:
    files.will_open_all(headers_only=True)
    return list(_headers(files, manifest))


def _headers(files: ShardFiles, manifest: Manifest) -> Iterator[Header]:
    fingerprint = fingerprint_hash(manifest.fingerprint)
    first: Header | None = None
    for shard, entry in enumerate(manifest.shards):
        header = files.header(shard, fingerprint)
        first = first or header
        if (header.feature_shape, header.storage) != (first.feature_shape, first.storage):
            raise UserError(f"{entry.file} has another feature shape or storage dtype than {manifest.shards[0].file}")
        yield header


def _opened(headers: list[Header], arrays: Mapping[str, np.ndarray]) -> OpenedShards:
    return OpenedShards(headers, KeyIndex(arrays), arrays.get("checksums"))


def _identity(manifest: Manifest) -> str:
    # A shard's checksum covers its keys, their hashes and the checksums of its rows.
    shards = "".join(f"{entry.rows} {entry.xxh3_128}\n" for entry in manifest.shards)
    return hashlib.sha256(f"key index 1\n{shards}".encode()).hexdigest()
