"""Image keys to RGB pictures; knows nothing of processors, towers or caches."""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import Image

from llava_twophase.errors import UserError, combined_error

# From this many pictures of one folder on, listing it is cheaper than asking for each.
_LIST_FROM = 16
# Modes of more than 8 bits a channel, which convert("RGB") clips.
_HIGH_BIT_DEPTH_MODES = ("I", "F")


class BadImage(Exception):
    """One picture that cannot be used, with the reason; what becomes of the run is the caller's policy."""


class Images(Protocol):
    """Where pictures come from; safe to hand to worker processes."""

    def prepare(self) -> None:
        """Do once what every worker process would do again, before they are started."""

    def read(self, key: str) -> bytes:
        """Read a picture's file.

        Raises:
            BadImage: It cannot be read, or it is empty.
        """

    def open(self, key: str) -> BinaryIO:
        """Open a picture's file, to look at its beginning.

        Raises:
            BadImage: It cannot be read, or it is empty.
        """

    def missing(self, keys: Iterable[str]) -> list[str]:
        """List the keys without a picture, in their order; cheap, nothing is read."""


def open_images(path: str | Path) -> Images:
    """Open ``--image_folder``: a folder, a zip archive or an uncompressed tar archive.

    Raises:
        UserError: It is none of them.
    """
    path = Path(path)
    if path.is_dir():
        return ImageFolder(path)
    if path.is_file():
        from llava_twophase.vision.archives import open_archive

        return open_archive(path)
    raise UserError(f"--image_folder {path} is neither a folder nor a .zip or .tar archive")


class ImageFolder:
    """Pictures as files below one folder.

    Args:
        root: The folder that image keys are relative to.

    Raises:
        UserError: It is not a folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"--image_folder {root} is not a folder")

    def prepare(self) -> None:
        """Do nothing: a folder needs no index."""

    def read(self, key: str) -> bytes:
        """Read a picture's file.

        Raises:
            BadImage: It cannot be read, or it is empty.
        """
        with self.open(key) as file:
            try:
                return file.read()
            except OSError as error:
                raise BadImage(f"cannot be read: {error.strerror or error}") from None

    def open(self, key: str) -> BinaryIO:
        """Open a picture's file.

        Raises:
            BadImage: It cannot be read, it is no regular file, or it is empty.
        """
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for its writer for good.
            descriptor = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise BadImage(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            os.close(descriptor)
            raise BadImage("the file is empty" if stat.S_ISREG(status.st_mode) else "it is not a regular file")
        return os.fdopen(descriptor, "rb")

    def missing(self, keys: Iterable[str]) -> list[str]:
        """List the keys without a picture, in their order.

        Folders are listed once: asking for each of 558K files would take minutes on a network filesystem.
        """
        keys = list(keys)
        names = defaultdict(list)
        for key in keys:
            folder, _, name = key.rpartition("/")
            names[folder].append(name)
        gone: set[str] = set()
        for folder, wanted in names.items():
            prefix = f"{folder}/" if folder else ""
            gone.update(prefix + name for name in self._missing_in(folder, wanted))
        return [key for key in keys if key in gone]

    def _missing_in(self, folder: str, names: list[str]) -> Iterable[str]:
        path = self._path(folder)
        if len(names) < _LIST_FROM:
            return [name for name in names if not os.path.isfile(os.path.join(path, name.encode()))]
        try:
            with os.scandir(path) as entries:
                there = {entry.name for entry in entries if entry.is_file()}
        except OSError:
            return names
        return [name for name in names if name.encode() not in there]

    def _path(self, key: str) -> bytes:
        # As bytes, so that no locale has a say in how a key becomes a file name.
        return os.path.join(os.fsencode(self.root), key.encode())


def require(images: Images, keys: Iterable[str], where: str | Path) -> None:
    """Check that every picture is there, before any expensive work.

    Args:
        images: Where the pictures are.
        keys: Image keys.
        where: What the user gave as ``--image_folder``.

    Raises:
        UserError: Some are missing: all of them are counted, the first are named.
    """
    keys = list(keys)
    missing = images.missing(keys)
    if missing:
        raise combined_error(missing, f"{len(missing)} of {len(keys)} images are missing in --image_folder {where}")


def decode(data: bytes) -> Image.Image:
    """Decode a picture exactly as LLaVA does: by content, ``convert("RGB")`` and nothing else.

    Alpha is dropped, EXIF orientation ignored, the first frame of an animation taken, 16-bit grey clipped.

    Args:
        data: The file's bytes.

    Returns:
        An RGB picture, fully decoded.

    Raises:
        BadImage: It is no picture, truncated, or beyond Pillow's decompression-bomb limit.
    """
    return decode_image(data)[0]


def decode_image(data: bytes) -> tuple[Image.Image, bool]:
    """Decode like ``decode``, and tell whether the picture had more than 8 bits a channel, which were clipped."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of palettes with transparency and of large pictures, once an image: noise at 558K images.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                high_bit_depth = image.mode.split(";")[0] in _HIGH_BIT_DEPTH_MODES
                return image.convert("RGB"), high_bit_depth
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged files, MemoryError included
        raise BadImage(_reason(error)) from None


def check_header(file: BinaryIO) -> None:
    """Tell cheaply whether a file begins like a picture of a size that will be decoded; the rest is not looked at.

    Raises:
        BadImage: Pillow knows no such kind of file, or it is beyond the decompression-bomb limit.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(file).close()
    except Exception as error:  # as in decode
        raise BadImage(_reason(error)) from None


def _reason(error: Exception) -> str:
    # Without Pillow's "<_io.BytesIO object at 0x7f...>", which would differ from run to run.
    return "cannot be decoded: " + (re.sub(r" ?<_io\.\w+ .*?>", "", str(error)) or type(error).__name__)
