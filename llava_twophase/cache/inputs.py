"""Checks and conversions of what a caller gives to ``CacheWriter``: arguments, keys, features, image files."""

from __future__ import annotations

import hashlib
import posixpath
import sys
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.cache.fingerprint import normalize
from llava_twophase.cache.format import QUANTISED, STORAGE_DTYPES
from llava_twophase.errors import UserError

Source = str | PathLike[str] | bytes | tuple[int, bytes]
"""An image file: its path, its content, or its size and SHA-256."""

NOT_RECORDED = (0, bytes(32))
"""Size and SHA-256 of a row whose image file is not recorded."""

_LONGEST_KEY = 1 << 16


def make_codec(dtype: str, shape: tuple[int, int], channels: Channels | None) -> Codec:
    """Check dtype, shape and channels, and make the codec of a cache from them."""
    if dtype not in STORAGE_DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(STORAGE_DTYPES)}")
    if len(shape) != 2 or not all(int(size) == size and size > 0 for size in shape):
        raise UserError(f"shape is {shape!r}, expected the tokens and the width of one row, such as (576, 1024)")
    if channels is not None:
        if dtype not in QUANTISED:
            raise UserError(f"channels are for int8 and int4 only, but dtype is {dtype!r}")
        channels = Channels(*(np.array(values, "<f4") for values in (channels.mean, channels.std)))
        if not np.isfinite([channels.mean, channels.std]).all() or not (channels.std > 0).all():
            raise UserError("channels must be finite, and every std positive")
    return Codec(dtype, (int(shape[0]), int(shape[1])), channels)


def fingerprint_with_channels(fingerprint: dict[str, Any], channels: Channels | None) -> dict[str, Any]:
    """Add the hash of the channels to a fingerprint: readers of int8 and int4 check them against it."""
    if channels is None:
        return fingerprint
    named = fingerprint.setdefault("channels", {"sha256": channels.sha256()})
    if not isinstance(named, dict) or named.get("sha256") != channels.sha256():
        raise UserError("the fingerprint's field channels does not match the channels; remove it, because it is added")
    return fingerprint


def json_object(value: Any, name: str) -> dict[str, Any]:
    """Return a dict as reading it back from JSON gives it.

    Args:
        value: What the caller gave.
        name: The name of the argument, for the error.
    """
    try:
        if isinstance(value, dict):
            return normalize(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{name} cannot be written as JSON: {error}") from None
    raise UserError(f"{name} is a {type(value).__name__}, expected a dict of JSON values")


def check_key(key: object) -> None:
    """Refuse a key that is not a normalised relative path."""
    try:
        valid = (
            isinstance(key, str)
            and 0 < len(key.encode("utf-8")) <= _LONGEST_KEY
            and "\0" not in key
            and posixpath.normpath(key) == key
            and key not in (".", "..")
            and not key.startswith(("/", "../"))
        )
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise UserError(
            f"key {key!r} is not valid; expected a relative path with forward slashes and without . and .. parts, "
            "such as 00453/004539375.jpg"
        )


def to_float32(key: str, features: Any) -> np.ndarray:
    """Return numpy or torch features as float32, which holds every accepted dtype exactly."""
    torch: Any = sys.modules.get("torch")  # if features are a tensor, torch is loaded already
    if torch is not None and isinstance(features, torch.Tensor):
        name = str(features.dtype).removeprefix("torch.")
    else:
        features = np.asarray(features)
        name = features.dtype.name
    if name not in ("float32", "float16", "bfloat16"):
        raise UserError(f"features of {key!r} have dtype {name}, expected float32, float16 or bfloat16")
    if isinstance(features, np.ndarray):
        array = features
    else:
        tensor = features.detach().cpu().contiguous()
        array = tensor.view(torch.int16).numpy() if name == "bfloat16" else tensor.numpy()
    if name == "bfloat16":  # the upper half of a float32
        return (np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(array, np.float32)


def describe_source(key: str, source: Source | None) -> tuple[int, bytes]:
    """Return size and SHA-256 of an image file."""
    if source is None:
        return NOT_RECORDED
    if isinstance(source, tuple):
        size, digest = source
        if type(size) is not int or size < 0 or not isinstance(digest, bytes) or len(digest) != 32:
            raise UserError(f"source of {key!r} is {source!r}, expected a size in bytes and a SHA-256 of 32 bytes")
        return size, digest
    try:
        data = source if isinstance(source, bytes) else Path(fspath(source)).read_bytes()
    except OSError as error:
        raise UserError(f"source of {key!r} cannot be read: {error}") from None
    return len(data), hashlib.sha256(data).digest()
