"""The format of the feature cache, version 1: its specification, and the names and dtypes that it uses.

A feature cache is a directory: ``manifest.json``, ``shards/shard-NNNNNN.h5`` and, if images were skipped,
``quarantine.jsonl``. All text is UTF-8. All numbers are little-endian.

Shard (HDF5 file)
    1. A shard MUST be an HDF5 file with a user block of 4096 bytes and superblock version 0, which h5ls, h5dump,
       HDFView and MATLAB open without a plugin. It MUST NOT have links or datasets other than those below.
    2. The user block MUST be one line of canonical JSON (sorted keys, no spaces, ASCII), padded with spaces, ending in
       a newline. This *header* MUST have ``format``, ``schema``, ``storage``, ``fingerprint`` (SHA-256 of the
       fingerprint's canonical JSON), ``file_bytes``, ``datasets`` and ``xxh3_128``.
    3. ``datasets`` MUST have the ``dtype``, ``shape`` and ``offset`` of each dataset. Each dataset is contiguous and
       unfiltered, and starts at that byte of the file. A reader MAY use offset and length alone (pread, object store,
       GPUDirect).
    4. ``storage`` is the dtype in which features are stored. ``/features`` MUST start at a multiple of 4096, and all
       values MUST be finite.
       ``float32``, ``float16``, ``bfloat16``: the values themselves, [rows, tokens, dim]. bfloat16 is HDF5's custom
       float of 16 bits (sign 15, exponent 7-14, bias 127, mantissa 0-6).
       ``int8``: q as int8 [rows, tokens, dim], with ``/scale`` float16 [rows, tokens].
       ``int4``: uint8 [rows, tokens, dim / 2]. Each byte has q + 8 of an even channel in its low four bits and q + 8 of
       the next channel in its high four bits. ``/scale`` is float16 [rows, tokens, dim / 32], one for each 32
       consecutive channels.
       For both, value = q * scale * std + mean, in float32. mean and std are ``/channel_mean`` and ``/channel_std``,
       float32 [dim], the same in all shards of a cache.
    5. ``/image_key`` [rows] MUST be fixed-length null-padded UTF-8: the path relative to the image folder, with forward
       slashes, never absolute, never outside the folder. Keys MUST be unique within a cache.
    6. ``/key_xxh3`` uint64 [rows] MUST be the XXH3-64 of the key's bytes. ``/row_xxh3`` uint64 [rows] MUST be the
       XXH3-64 of the row's bytes in ``/features``, followed by its bytes in ``/scale`` if there is one.
    7. ``/source_size`` uint64 [rows] and ``/source_sha256`` uint8 [rows, 32] MUST be the image file's size and SHA-256.
       Features without an image file have zeros in both.
    8. ``xxh3_128`` MUST be the XXH3-128 of all bytes after the user block, except those of ``/features`` and
       ``/scale``. Together with the row checksums and the header's canonical form, it covers every bit of the file.
    9. The root attributes ``schema`` (int), ``fingerprint`` and ``provenance`` (JSON) MUST exist, and the attribute
       ``encoding`` of ``/features``, which says in words how to read its values.
    10. A shard MUST be written under another name, synced, and renamed: it is either sealed or absent. A sealed shard
        MUST NOT change. Its bytes MUST NOT depend on host, date or number of ranks.

Manifest (``manifest.json``)
    11. It MUST have ``format``, ``schema``, ``fingerprint``, ``provenance``, ``channels`` (for int8 and int4, ``mean``
        and ``std`` as base64 of float32), ``images_per_shard``, ``complete``, ``plan`` and ``shards``: for each shard
        its ``file``, ``rows``, ``file_bytes`` and ``xxh3_128``. It MUST be replaced by rename.
    12. ``complete`` MUST be false while an extraction is running or after it was interrupted. It MUST be the last thing
        to become true.

Readers
    13. A reader MUST refuse another ``format`` or ``schema``, or an unknown ``storage``, and report its value. It MUST
        NOT read outside the directory.
    14. A reader MUST NOT lock. It MUST refuse a shard whose header, size or fingerprint differs from the manifest.
    15. A reader MAY ignore unknown keys of header and manifest.
"""

from __future__ import annotations

import hashlib
import json
from math import prod
from typing import Any

import numpy as np

from llava_twophase.errors import UserError, short_repr

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
"""The numpy dtype of ``/features`` for each storage dtype. numpy has no bfloat16, so its bits are read as uint16."""
QUANTISED = ("int8", "int4")
BLOCK = 32
ROW_PARTS = ("features", "scale")
"""The datasets that a stored row consists of, in the order in which they are hashed and read."""

ENCODINGS = {
    "bfloat16": "bfloat16 values",
    "float16": "float16 values",
    "float32": "float32 values",
    "int8": "q; value = q * scale[row, token] * channel_std + channel_mean",
    "int4": "two to a byte: q + 8 of channel 2i in bits 0-3 of byte i, of channel 2i + 1 in bits 4-7; "
    "value = q * scale[row, token, channel // 32] * channel_std + channel_mean",
}
"""The attribute ``encoding`` of ``/features`` for each storage dtype."""

_COLUMNS = {
    "key_xxh3": ("<u8", ()),
    "row_xxh3": ("<u8", ()),
    "source_size": ("<u8", ()),
    "source_sha256": ("|u1", (32,)),
}


def check_schema(content: dict[str, Any], file: str) -> None:
    """Refuse another format or schema version.

    Raises:
        UserError: ``content`` is of another format or version, which the message gives.
    """
    if content.get("format") != FORMAT:
        raise UserError(f"{file} has the format {short_repr(content.get('format'))}; expected {FORMAT!r}")
    if content.get("schema") != SCHEMA or isinstance(content.get("schema"), bool):
        raise UserError(
            f"{file} has schema version {short_repr(content.get('schema'))}; this llava-twophase reads version "
            f"{SCHEMA}: install the version that wrote it, or extract the features again"
        )


def layout(
    storage: str, rows: int, feature_shape: tuple[int, int], key_bytes: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every dataset of a shard, in file order.

    Raises:
        UserError: The storage is ``int4`` and the width is not a multiple of 32.
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


def row_bytes(storage: str, feature_shape: tuple[int, int]) -> int:
    """Return the bytes of a stored row: its features and, for ``int8`` and ``int4``, their scales.

    Raises:
        UserError: The storage is ``int4`` and the width is not a multiple of 32.
    """
    datasets = layout(storage, 1, feature_shape, 1)
    features = prod(datasets["features"][1]) * STORAGE_DTYPES[storage].itemsize
    return features + (2 * prod(datasets["scale"][1]) if "scale" in datasets else 0)


def canonical_json(value: Any) -> str:
    """Serialise to the form that is hashed and compared: ASCII, sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint_hash(fingerprint: dict[str, Any]) -> str:
    """Return the SHA-256 (hex) of a fingerprint's canonical JSON."""
    return hashlib.sha256(canonical_json(fingerprint).encode("ascii")).hexdigest()


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.h5"
