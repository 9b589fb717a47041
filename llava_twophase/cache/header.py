"""The header of a shard: where its datasets are, as rules 2 to 4 of the format describe."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from llava_twophase.cache.format import (
    ALIGNMENT,
    FORMAT,
    ROW_PARTS,
    SCHEMA,
    STORAGE_DTYPES,
    USER_BLOCK,
    canonical_json,
    check_schema,
    layout,
)
from llava_twophase.errors import UserError, short_repr

_CHECKSUM = b'"xxh3_128":"'


@dataclass(frozen=True)
class StoredDataset:
    """The position of one dataset in a shard.

    Attributes:
        dtype: ``bfloat16``, or a numpy dtype string such as ``<f4`` or ``|S19``.
        shape: Its shape. The first dimension is rows, except for the channels.
        offset: Its first byte in the file.
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
        """Size in bytes."""
        return prod(self.shape) * self.numpy_dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return prod(self.shape[1:]) * self.numpy_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """A shard's user block: everything that a reader needs to find its values.

    Attributes:
        storage: Storage dtype, a key of ``STORAGE_DTYPES``.
        fingerprint: SHA-256 (hex) of the fingerprint.
        file_bytes: Length of the file.
        datasets: The position of each dataset.
        xxh3_128: Checksum (hex) of rule 8.
    """

    storage: str
    fingerprint: str
    file_bytes: int
    datasets: dict[str, StoredDataset]
    xxh3_128: str

    @property
    def rows(self) -> int:
        """Number of images in the shard."""
        return self.datasets["features"].shape[0]

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Tokens and width of one image's features."""
        _, tokens, width = self.datasets["features"].shape
        return tokens, width * 2 if self.storage == "int4" else width

    @property
    def row_parts(self) -> list[StoredDataset]:
        """The datasets that a stored row consists of, in order."""
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
        The header. Every dataset is within ``file_bytes`` and has the same number of rows.

    Raises:
        UserError: The block is inconsistent, or is not a header of this format and schema.
    """
    # Headers of shards of one size differ only in their checksum, so the rest is parsed once. This halves the time to
    # open a cache of 20,000 shards.
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
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a shard of a feature cache: its header cannot be read ({error})") from None
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
        raise UserError(f"{file} has a damaged header: {short_repr(error)}; extract the shard again") from None
    return header


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is not a count")
    return value


def _storage(value: Any, file: str) -> str:
    if value not in STORAGE_DTYPES:
        raise UserError(
            f"{file} stores features as {short_repr(value)}; this llava-twophase reads {', '.join(STORAGE_DTYPES)}"
        )
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
            raise ValueError(f"{name} is outside the file")
