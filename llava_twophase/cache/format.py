"""The feature cache's format, version 1: names, dtypes and the shard's header; knows nothing of who writes or reads.

A feature cache is a directory: ``manifest.json``, ``shards/shard-NNNNNN.h5`` and, where images were left out,
``quarantine.jsonl``. All text is UTF-8, all numbers are little-endian.

Shard (HDF5 file)
    1. A shard MUST be an HDF5 file with a user block of 4096 bytes and superblock version 0, which h5ls, h5dump,
       HDFView and MATLAB open without a plugin. It MUST NOT hold links or datasets other than those below.
    2. The user block MUST be one line of canonical JSON (sorted keys, no spaces, ASCII), padded with spaces, ending in
       a newline. This *header* MUST hold ``format``, ``schema``, ``storage``, ``fingerprint`` (SHA-256 of the
       fingerprint's canonical JSON), ``file_bytes``, ``datasets`` and ``xxh3_128``.
    3. ``datasets`` MUST give for each dataset its ``dtype``, ``shape`` and ``offset``: each is contiguous, unfiltered,
       and starts at that byte of the file. A reader MAY use offset and length alone (pread, object store, GPUDirect).
    4. ``storage`` names how features are kept. ``/features`` MUST start at a multiple of 4096, all values be finite:
       ``float32``, ``float16``, ``bfloat16``: [rows, tokens, dim] are the values themselves, bfloat16 as HDF5's custom
       float of 16 bits (sign 15, exponent 7-14, bias 127, mantissa 0-6).
       ``int8``: q int8 [rows, tokens, dim] with ``/scale`` float16 [rows, tokens].
       ``int4``: uint8 [rows, tokens, dim / 2], each byte q + 8 of an even channel in the low four bits and of the next
       one in the high, with ``/scale`` float16 [rows, tokens, dim / 32] for 32 neighbouring channels.
       For both, value = q * scale * std + mean, in float32, with float32 [dim] ``/channel_std``, ``/channel_mean``,
       the same in all shards of a cache.
    5. ``/image_key`` [rows] MUST be fixed-length null-padded UTF-8: the path relative to the image folder, forward
       slashes, never absolute, never leaving the folder. A key MUST NOT stand twice in a cache.
    6. ``/key_xxh3`` uint64 [rows] MUST be the XXH3-64 of the key's bytes; ``/row_xxh3`` uint64 [rows] that of the row's
       bytes in ``/features``, followed by its bytes in ``/scale`` where there is one.
    7. ``/source_size`` uint64 [rows] and ``/source_sha256`` uint8 [rows, 32] MUST be the image file's size and SHA-256.
    8. ``xxh3_128`` MUST be the XXH3-128 of all bytes behind the user block but those of ``/features`` and ``/scale``.
       With the row checksums and the header's canonical form, every bit of the file is checked.
    9. The root attributes ``schema`` (int), ``fingerprint`` and ``provenance`` (JSON) MUST be there, and ``encoding``
       at ``/features``: how to read its values, in words.
    10. A shard MUST be written under another name, synced, and renamed: sealed, or absent. A sealed shard MUST NOT
        change. Its bytes MUST NOT depend on host, date or number of ranks.

Manifest (``manifest.json``)
    11. It MUST hold ``format``, ``schema``, ``fingerprint``, ``provenance``, ``channels`` (for int8 and int4, ``mean``
        and ``std`` as base64 of float32), ``images_per_shard``, ``complete``, ``plan`` and ``shards``: for each its
        ``file``, ``rows``, ``file_bytes`` and ``xxh3_128``. It MUST be replaced by rename.
    12. ``complete`` MUST be false while an extraction is under way or was cut, and turn true last.

Readers
    13. A reader MUST refuse another ``format`` or ``schema``, or a ``storage`` it does not know, by name, and MUST NOT
        read outside the directory.
    14. A reader MUST NOT lock, and MUST refuse a shard whose header, size or fingerprint disagrees with the manifest.
    15. A reader MAY ignore keys of header and manifest that it does not know.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
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
    "int8": np.dtype("|i1"),
    "int4": np.dtype("|u1"),
}
"""Storage dtype to the numpy dtype of ``/features``; numpy has no bfloat16, so its bits come as uint16."""
QUANTISED = ("int8", "int4")
BLOCK = 32
ROW_PARTS = ("features", "scale")
"""The datasets that a row's stored bytes come from, in the order in which they are hashed and read."""

ENCODINGS = {
    "bfloat16": "bfloat16 values",
    "float16": "float16 values",
    "float32": "float32 values",
    "int8": "q; value = q * scale[row, token] * channel_std + channel_mean",
    "int4": "two to a byte: q + 8 of channel 2i in bits 0-3 of byte i, of channel 2i + 1 in bits 4-7; "
    "value = q * scale[row, token, channel // 32] * channel_std + channel_mean",
}
"""Storage dtype to the attribute ``encoding`` of ``/features``."""

_CHECKSUM = b'"xxh3_128":"'
_COLUMNS = {
    "key_xxh3": ("<u8", ()),
    "row_xxh3": ("<u8", ()),
    "source_size": ("<u8", ()),
    "source_sha256": ("|u1", (32,)),
}


@dataclass(frozen=True)
class StoredDataset:
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

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one row."""
        return prod(self.shape[1:]) * self.numpy_dtype.itemsize


@dataclass(frozen=True)
class Header:
    """A shard's user block: all that a reader needs to find its bytes.

    Attributes:
        storage: Storage dtype, a key of ``STORAGE_DTYPES``.
        fingerprint: SHA-256 (hex) of the fingerprint.
        file_bytes: Length of the file.
        datasets: Where each dataset lies.
        xxh3_128: Checksum (hex) of all but the user block and the rows' features.
    """

    storage: str
    fingerprint: str
    file_bytes: int
    datasets: dict[str, StoredDataset]
    xxh3_128: str

    @property
    def rows(self) -> int:
        """Images in the shard."""
        return self.datasets["features"].shape[0]

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Tokens and width of one image's features, decoded."""
        _, tokens, width = self.datasets["features"].shape
        return tokens, width * 2 if self.storage == "int4" else width

    @property
    def row_parts(self) -> list[StoredDataset]:
        """The datasets that make up a row's stored bytes, in order."""
        return [self.datasets[name] for name in ROW_PARTS if name in self.datasets]

    def to_bytes(self) -> bytes:
        """Return the user block, ``USER_BLOCK`` bytes."""
        content = {
            "format": FORMAT,
            "schema": SCHEMA,
            "storage": self.storage,
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
    # Shards of one size differ in their checksum alone: the rest is parsed once, which is what opening 20,000 costs.
    head, mark, tail = block.rpartition(_CHECKSUM)
    with suppress(UserError, UnicodeDecodeError):
        header = _parse_alike(head + mark + tail[32:])
        if not header.xxh3_128:
            return replace(header, xxh3_128=tail[:32].decode("ascii"))
    return _parse(block, file)


@lru_cache(maxsize=256)
def _parse_alike(block: bytes) -> Header:
    return _parse(block, "")


def _parse(block: bytes, file: str) -> Header:
    try:
        content = json.loads(block.decode("ascii"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no shard of a feature cache: its header cannot be read ({error})") from None
    check_schema(content, file)
    try:
        datasets = {
            str(name): StoredDataset(str(entry["dtype"]), tuple(map(_count, entry["shape"])), _count(entry["offset"]))
            for name, entry in content["datasets"].items()
        }
        header = Header(
            _storage(content["storage"], file),
            str(content["fingerprint"]),
            _count(content["file_bytes"]),
            datasets,
            str(content["xxh3_128"]),
        )
        _check_layout(header)
    except UserError:
        raise
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


def layout(
    storage: str, rows: int, feature_shape: tuple[int, int], key_bytes: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Give dtype and shape of every dataset of a shard, in file order.

    Raises:
        UserError: ``int4`` and a width that is no multiple of its block.
    """
    tokens, dim = feature_shape
    if storage == "int4" and dim % BLOCK:
        raise UserError(f"int4 keeps blocks of {BLOCK} channels, but the features are {dim} wide; use int8")
    datasets: dict[str, tuple[str, tuple[int, ...]]] = {"image_key": (f"|S{key_bytes}", (rows,))}
    datasets |= {name: (dtype, (rows, *shape)) for name, (dtype, shape) in _COLUMNS.items()}
    if storage in QUANTISED:
        datasets |= {"channel_mean": ("<f4", (dim,)), "channel_std": ("<f4", (dim,))}
        datasets["scale"] = ("<f2", (rows, tokens) if storage == "int8" else (rows, tokens, dim // BLOCK))
    dtype = "bfloat16" if storage == "bfloat16" else STORAGE_DTYPES[storage].str
    datasets["features"] = (dtype, (rows, tokens, dim // 2 if storage == "int4" else dim))
    return datasets


def canonical_json(value: Any) -> str:
    """Serialise to the one spelling that is hashed and compared: ASCII, sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint_hash(fingerprint: dict[str, Any]) -> str:
    """Return the sha256 (hex) of a fingerprint's canonical JSON."""
    return hashlib.sha256(canonical_json(fingerprint).encode("ascii")).hexdigest()


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.h5"


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is no count")
    return value


def _storage(value: Any, file: str) -> str:
    if value not in STORAGE_DTYPES:
        raise UserError(f"{file} stores features as {value!r}; this llava-twophase reads {', '.join(STORAGE_DTYPES)}")
    return str(value)


def _check_layout(header: Header) -> None:
    features, key = header.datasets["features"], header.datasets["image_key"]
    if not key.dtype.startswith("|S") or not 1 <= key.numpy_dtype.itemsize <= 1 << 16:
        raise ValueError(f"image_key has dtype {key.dtype}")
    if min(features.shape) < 1 or features.offset % ALIGNMENT:
        raise ValueError("features is empty or not aligned")
    expected = layout(header.storage, header.rows, header.feature_shape, key.numpy_dtype.itemsize)
    if header.datasets.keys() != expected.keys():
        raise ValueError(f"its datasets are {sorted(header.datasets)}")
    for name, data in header.datasets.items():
        if (data.dtype, data.shape) != expected[name]:
            raise ValueError(f"{name} is {data.dtype} {data.shape}, expected {expected[name]}")
        if data.offset < USER_BLOCK or data.offset + data.nbytes > header.file_bytes:
            raise ValueError(f"{name} lies outside the file")
