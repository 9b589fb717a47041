"""The feature cache's format, version 1: names, dtypes and the shard's header; knows nothing of who writes or reads.

A feature cache is a directory: ``manifest.json``, ``shards/shard-NNNNNN.h5`` and, where images were left out,
``quarantine.jsonl``. All text is UTF-8, all numbers are little-endian.

Shard (HDF5 file)
    1. A shard MUST be an HDF5 file with a user block of 4096 bytes and superblock version 0, which h5ls, h5dump,
       HDFView and MATLAB open without a plugin. It MUST NOT hold links or datasets other than those below.
    2. The user block MUST be one line of canonical JSON (sorted keys, no spaces, ASCII), padded with spaces, ending in
       a newline. This *header* MUST hold ``format``, ``schema``, ``fingerprint`` (sha256 of the fingerprint's canonical
       JSON), ``file_bytes``, ``datasets`` and ``xxh3_128``.
    3. ``datasets`` MUST give for each dataset its ``dtype``, ``shape`` and ``offset``: each is contiguous, unfiltered,
       and starts at that byte of the file. A reader MAY use offset and length alone (pread, object store, GPUDirect).
    4. ``/features`` [rows, tokens, dim] MUST start at a multiple of 4096 and be float32, float16 or bfloat16, the last
       as HDF5's custom float of 16 bits (sign 15, exponent 7-14, bias 127, mantissa 0-6).
    5. ``/image_key`` [rows] MUST be fixed-length null-padded UTF-8: the path relative to the image folder, forward
       slashes, never absolute, never leaving the folder. A key MUST NOT stand twice in a cache.
    6. ``/key_xxh3`` uint64 [rows] MUST be the XXH3-64 of the key's bytes; ``/row_xxh3`` uint64 [rows] of the row's
       stored bytes in ``/features``.
    7. ``/source_size`` uint64 [rows] and ``/source_sha256`` uint8 [rows, 32] MUST be the image file's size and SHA-256.
    8. ``xxh3_128`` MUST be the XXH3-128 of all bytes behind the user block but the rows of ``/features``. With the
       row checksums and the header's canonical form, every bit of the file is checked.
    9. The root attributes ``schema`` (int), ``fingerprint`` and ``provenance`` (JSON) MUST be there.
    10. A shard MUST be written under another name, synced, and renamed: sealed, or absent. A sealed shard MUST NOT
        change. Its bytes MUST NOT depend on host, date or number of ranks.

Manifest (``manifest.json``)
    11. It MUST hold ``format``, ``schema``, ``fingerprint``, ``provenance``, ``images_per_shard``, ``complete``,
        ``plan`` and ``shards``: for each its ``file``, ``rows``, ``file_bytes`` and ``xxh3_128``. It MUST be replaced
        by rename.
    12. ``complete`` MUST be false while an extraction is under way or was cut, and turn true last.

Readers
    13. A reader MUST refuse another ``format`` or ``schema`` by name, and MUST NOT read outside the directory.
    14. A reader MUST NOT lock, and MUST refuse a shard whose header, size or fingerprint disagrees with the manifest.
    15. A reader MAY ignore keys of header and manifest that it does not know.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from llava_twophase.errors import UserError

FORMAT = "llava-twophase-feature-cache"
SCHEMA = 1
USER_BLOCK = 4096
ALIGNMENT = 4096
MANIFEST = "manifest.json"
SHARDS = "shards"
QUARANTINE = "quarantine.jsonl"

STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""Storage dtype to the numpy dtype of its raw bytes; numpy has no bfloat16, so its bits come as uint16."""

_COLUMNS = {
    "key_xxh3": ("<u8", ()),
    "row_xxh3": ("<u8", ()),
    "source_size": ("<u8", ()),
    "source_sha256": ("|u1", (32,)),
}


@dataclass(frozen=True)
class Dataset:
    """Where one dataset lies in a shard.

    Attributes:
        dtype: ``bfloat16``, or a numpy dtype string such as ``<f4`` or ``|S19``.
        shape: Its shape; the first dimension is rows.
        offset: Its first byte in the file, user block included.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """The numpy dtype of the stored bytes (uint16 for bfloat16)."""
        return STORAGE_DTYPES["bfloat16"] if self.dtype == "bfloat16" else np.dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return prod(self.shape) * self.numpy_dtype.itemsize


@dataclass(frozen=True)
class Header:
    """A shard's user block: all that a reader needs to find its bytes."""

    fingerprint: str
    file_bytes: int
    datasets: dict[str, Dataset]
    xxh3_128: str

    @property
    def rows(self) -> int:
        """Images in the shard."""
        return self.datasets["features"].shape[0]

    @property
    def storage_dtype(self) -> str:
        """Storage dtype by its long name."""
        return storage_dtype_name(self.datasets["features"].dtype)

    def encode(self) -> bytes:
        """Return the user block, ``USER_BLOCK`` bytes."""
        content = {
            "format": FORMAT,
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "file_bytes": self.file_bytes,
            "datasets": {
                name: {"dtype": data.dtype, "shape": list(data.shape), "offset": data.offset}
                for name, data in self.datasets.items()
            },
            "xxh3_128": self.xxh3_128,
        }
        line = canonical_json(content).encode("ascii")
        if len(line) >= USER_BLOCK:
            raise ValueError(f"a shard header of {len(line)} bytes does not fit {USER_BLOCK}")
        return line.ljust(USER_BLOCK - 1) + b"\n"


def decode_header(block: bytes, file: str) -> Header:
    """Read and check a user block.

    Args:
        block: The file's first ``USER_BLOCK`` bytes.
        file: What to call the shard in errors.

    Returns:
        The header; every dataset lies within ``file_bytes`` and has as many rows as the others.

    Raises:
        UserError: It is no shard of this format and schema, or inconsistent.
    """
    try:
        content = json.loads(block.decode("ascii"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no shard of a feature cache: its header cannot be read ({error})") from None
    check_schema(content, file)
    try:
        datasets = {
            str(name): Dataset(str(entry["dtype"]), tuple(map(_count, entry["shape"])), _count(entry["offset"]))
            for name, entry in content["datasets"].items()
        }
        header = Header(str(content["fingerprint"]), _count(content["file_bytes"]), datasets, str(content["xxh3_128"]))
        _check_layout(header)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} has a damaged header: {error!r}; extract the shard again") from None
    return header


def check_schema(content: dict[str, Any], file: str) -> None:
    """Refuse another format or schema version, by name.

    Raises:
        UserError: ``content`` does not say it is this format in this version.
    """
    if content.get("format") != FORMAT:
        raise UserError(f"{file} says its format is {content.get('format')!r}; expected {FORMAT!r}")
    if content.get("schema") != SCHEMA or isinstance(content.get("schema"), bool):
        raise UserError(
            f"{file} has schema version {content.get('schema')!r}; this llava-twophase reads version {SCHEMA}: "
            "install the version that wrote it, or extract the features again"
        )


def columns(rows: int, key_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Give dtype and shape of every dataset of a shard but ``features``, in file order."""
    fixed = {name: (dtype, (rows, *shape)) for name, (dtype, shape) in _COLUMNS.items()}
    return {"image_key": (f"|S{key_bytes}", (rows,)), **fixed}


def canonical_json(value: Any) -> str:
    """Serialise to the one spelling that is hashed and compared: ASCII, sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint_hash(fingerprint: dict[str, Any]) -> str:
    """Return the sha256 (hex) of a fingerprint's canonical JSON."""
    return hashlib.sha256(canonical_json(fingerprint).encode("ascii")).hexdigest()


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.h5"


def storage_dtype_name(dtype: str) -> str:
    """Turn a dataset's dtype into the storage dtype's long name.

    Raises:
        ValueError: It is none of the storage dtypes.
    """
    names = {"bfloat16": "bfloat16", "<f2": "float16", "<f4": "float32"}
    if dtype not in names:
        raise ValueError(f"unknown storage dtype {dtype}")
    return names[dtype]


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is no count")
    return value


def _check_layout(header: Header) -> None:
    features = header.datasets["features"]
    rows, _tokens, _dim = features.shape
    storage_dtype_name(features.dtype)
    key = header.datasets["image_key"]
    if not key.dtype.startswith("|S") or not 1 <= key.numpy_dtype.itemsize <= 1 << 16:
        raise ValueError(f"image_key has dtype {key.dtype}")
    if min(features.shape) < 1 or features.offset % ALIGNMENT:
        raise ValueError("features is empty or not aligned")
    if header.datasets.keys() != {"features", "image_key", *_COLUMNS}:
        raise ValueError(f"its datasets are {sorted(header.datasets)}")
    for name, (dtype, shape) in columns(rows, key.numpy_dtype.itemsize).items():
        data = header.datasets[name]
        if (data.dtype, data.shape) != (dtype, shape):
            raise ValueError(f"{name} is {data.dtype} {data.shape}, expected {dtype} {shape}")
    for name, data in header.datasets.items():
        if data.offset < USER_BLOCK or data.offset + data.nbytes > header.file_bytes:
            raise ValueError(f"{name} lies outside the file")
