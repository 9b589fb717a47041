"""Image files to RGB images, and the reasons why a file cannot be used."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from llava_twophase.vision import file_kinds

OUT_OF_MEMORY = "out of memory"
"""Part of the reason if an image needs more memory than there is: another time it may be usable."""

FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are decoded; JPEG includes MPO. For some others Pillow starts another program (EPS: Ghostscript)."""

# Modes with more than 8 bits per channel, which convert("RGB") clips.
_HIGH_BIT_DEPTH_MODES = ("I", "F")


class BadImage(Exception):
    """One image that cannot be used, with the reason. The caller decides whether to skip the image or to stop."""


class DecodedImage(NamedTuple):
    """An RGB image, and whether its file had more than 8 bits per channel, which were clipped."""

    image: Image.Image
    high_bit_depth: bool


def decode(data: bytes) -> Image.Image:
    """Decode an image as LLaVA does: by content, with ``convert("RGB")`` and nothing else.

    Alpha is dropped, EXIF orientation is ignored, the first frame of an animation is used, 16-bit grey is clipped.

    Args:
        data: The file's bytes.

    Returns:
        An RGB image, fully decoded.

    Raises:
        BadImage: The file is not an image of one of ``FORMATS``, is damaged, or exceeds Pillow's decompression-bomb
            limit.
    """
    return decode_image(data).image


def decode_image(data: bytes) -> DecodedImage:
    """Decode like ``decode``, and also return whether values were clipped.

    Raises:
        BadImage: As ``decode``.
    """
    with _bad_image_on_error(data[: file_kinds.HEAD_BYTES]), Image.open(io.BytesIO(data), formats=_formats()) as image:
        high_bit_depth = image.mode.split(";")[0] in _HIGH_BIT_DEPTH_MODES
        return DecodedImage(image.convert("RGB"), high_bit_depth)


def check_header(file: BinaryIO) -> None:
    """Check that the first bytes of a file are those of an image that is not too large to decode.

    Raises:
        BadImage: The file is not an image of one of ``FORMATS``, or exceeds Pillow's decompression-bomb limit.
    """
    try:
        head = file.read(file_kinds.HEAD_BYTES)
        file.seek(0)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from None
    with _bad_image_on_error(head), Image.open(file, formats=_formats()):
        pass  # leaving the context keeps the file open


@contextmanager
def _bad_image_on_error(head: bytes) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # Pillow warns about palettes with transparency and about large images, once per image.
            warnings.simplefilter("ignore")
            yield
    except MemoryError:
        raise BadImage(f"cannot be decoded: {OUT_OF_MEMORY}") from None
    except Exception as error:  # Pillow's parsers raise almost any type on damaged files
        raise BadImage(f"cannot be decoded: {_reason(error, head)}") from None


def _reason(error: Exception, head: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        kind = file_kinds.describe(head)
        return f"it is {kind}" if kind else "it is not an image, or its header is damaged"
    # Without "<_io.BytesIO object at 0x7f...>", which would differ from run to run.
    return re.sub(r" ?<_io\.\w+ .*?>", "", str(error)) or type(error).__name__


@cache
def _formats() -> tuple[str, ...]:
    # Which formats this Pillow was built with is known only after its plugins are loaded.
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
