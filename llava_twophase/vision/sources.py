"""Where image files come from: a folder, or an archive. Image keys are paths relative to it."""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from llava_twophase.errors import UserError
from llava_twophase.vision.images import OUT_OF_MEMORY, BadImage, check_header

MAX_FILE_BYTES = 1 << 30
"""Larger files are refused: the largest image that Pillow decodes takes half of that, uncompressed."""
MISSING = "the file is missing"

# From this number of images in one folder on, listing the folder is cheaper than asking for each.
_LIST_FROM = 16
# Files from this size on are read only if they begin like an image.
_CHECK_HEADER_FROM = 1 << 26


class ImageSource(Protocol):
    """Where image files come from. It can be pickled and sent to worker processes."""

    def prepare(self) -> None:
        """Do what all worker processes need, before they start."""

    def read(self, key: str) -> bytes:
        """Read an image file.

        Raises:
            BadImage: It cannot be read, or it is empty.
        """

    def open(self, key: str) -> BinaryIO:
        """Open an image file, to read its first bytes.

        Raises:
            BadImage: It cannot be opened, or it is empty.
        """

    def missing(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the keys that have no file, in their order, with a reason for each; no file is opened."""


def open_images(path: str | Path, keys: Iterable[str] = ()) -> ImageSource:
    """Open ``--image_folder``: a folder, a zip archive or an uncompressed tar archive.

    Args:
        path: The folder or archive.
        keys: Image keys, from which the folder inside an archive is found that they are relative to. By default the
            first keys that are asked for.

    Raises:
        UserError: It is none of them.
    """
    path = Path(path)
    if path.is_dir():
        return ImageFolder(path)
    if path.is_file():
        from llava_twophase.vision.archives import open_archive

        return open_archive(path, keys)
    found = "is neither a folder nor an archive" if os.path.lexists(path) else "does not exist"
    raise UserError(f"--image_folder {path} {found}; expected a folder, or a .zip or .tar archive")


class ImageFolder:
    """Image files below one folder.

    Names are compared as bytes. If there is no such name, another Unicode normalisation form of it is accepted: macOS
    writes "é" as two characters. A difference in upper and lower case is only reported.

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
        """Read an image file.

        Raises:
            BadImage: It cannot be read, is empty, or is larger than ``MAX_FILE_BYTES``.
        """
        with self.open(key) as file:
            size = os.fstat(file.fileno()).st_size
            if size >= _CHECK_HEADER_FROM:
                check_header(file)
            require_size(size)
            try:
                file.seek(0)
                return file.read(size)  # a larger number would allocate as much
            except OSError as error:
                raise BadImage(f"cannot be read: {error.strerror or error}") from None
            except MemoryError:
                raise BadImage(f"cannot be read: {OUT_OF_MEMORY} for {size:,} bytes") from None

    def open(self, key: str) -> BinaryIO:
        """Open an image file.

        Raises:
            BadImage: It cannot be opened, is not a regular file, or is empty.
        """
        path = self._path(key)
        try:
            descriptor = _open(path)
        except FileNotFoundError as error:
            other = None if key.isascii() else _other_form(os.fsencode(self.root), key)
            if other is None:
                raise BadImage(_why_not_found(path, error)) from None
            descriptor = _open(other)
        except (OSError, ValueError) as error:
            raise BadImage(_why_not_opened(path, error)) from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            os.close(descriptor)
            raise BadImage("the file is empty" if stat.S_ISREG(status.st_mode) else _describe_type(status.st_mode))
        return os.fdopen(descriptor, "rb")

    def missing(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the keys that have no file, in their order, with a reason for each.

        Folders with many images are listed once: asking for each of 558K files takes minutes on a network filesystem. A
        name that exists but is not a usable file is not missing; ``open`` reports what it is.
        """
        keys = list(keys)
        names = defaultdict(list)
        for key in keys:
            folder, _, name = key.rpartition("/")
            names[folder].append(name)
        reasons: dict[str, str] = {}
        for folder, wanted in names.items():
            prefix = f"{folder}/" if folder else ""
            reasons.update((prefix + name, reason) for name, reason in self._missing_in(folder, prefix, wanted))
        return {key: reasons[key] for key in keys if key in reasons}

    def _missing_in(self, folder: str, prefix: str, names: list[str]) -> Iterable[tuple[str, str]]:
        path = self._path(folder)
        there = _existing_names(path) if len(names) >= _LIST_FROM else None
        folded: dict[str, bytes] | None = None
        for name in names:
            encoded = _to_bytes(name)
            if encoded in there if there is not None else _exists(os.path.join(path, encoded)):
                continue
            if not (prefix + name).isascii() and _other_form(os.fsencode(self.root), prefix + name) is not None:
                continue
            if folded is None:
                folded = {fold_name(os.fsdecode(other)): other for other in sorted(_existing_names(path))}
            similar = folded.get(fold_name(name))
            hint = f"; {os.fsdecode(similar)!r} differs only in upper and lower case" if similar else ""
            yield name, MISSING + hint

    def _path(self, key: str) -> bytes:
        # As bytes, so that file names do not depend on the locale.
        return os.path.join(os.fsencode(self.root), _to_bytes(key))


def require_size(size: int) -> None:
    """Check the size of an image file before it is read.

    Raises:
        BadImage: It is larger than ``MAX_FILE_BYTES``.
    """
    if size > MAX_FILE_BYTES:
        raise BadImage(
            f"the file has {size:,} bytes, more than the {MAX_FILE_BYTES:,} bytes that are read for an image"
        )


def fold_name(name: str) -> str:
    """Return a form of a name that is equal for names that differ only in case or Unicode normalisation form."""
    return unicodedata.normalize("NFC", name).casefold()


def _open(path: bytes) -> int:
    # Without O_NONBLOCK, opening a named pipe would wait for its writer forever.
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def _to_bytes(key: str) -> bytes:
    # Names that are not UTF-8 are strings with surrogates, as in os.fsdecode. Other surrogates match no file.
    try:
        return key.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return key.encode("utf-8", "surrogatepass")


def _exists(path: bytes) -> bool:
    # A file of any kind exists, also one that cannot be read; a symbolic link to a missing file does not.
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def _existing_names(folder: bytes) -> set[bytes]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_symlink() or _exists(entry.path)}
    except OSError:
        return set()


def _other_form(root: bytes, key: str) -> bytes | None:
    # The path of a key of which some parts exist only in another Unicode normalisation form.
    path = root
    for part in key.split("/"):
        exact = os.path.join(path, _to_bytes(part))
        if not _exists(exact):
            name = _names_by_form(path).get(unicodedata.normalize("NFC", part))
            if name is None:
                return None
            exact = os.path.join(path, name)
        path = exact
    return path


@lru_cache(maxsize=1024)
def _names_by_form(folder: bytes) -> dict[str, bytes]:
    # The last one wins if several names have the same normalised form; sorted, so that it is always the same one.
    names = ((os.fsdecode(name), name) for name in sorted(_existing_names(folder)))
    return {unicodedata.normalize("NFC", text): name for text, name in names if not text.isascii()}


def _why_not_found(path: bytes, error: OSError) -> str:
    if os.path.islink(path):
        return "it is a symbolic link to a file that does not exist"
    return f"cannot be read: {error.strerror}"


def _why_not_opened(path: bytes, error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENXIO, errno.ENODEV, errno.EACCES):
        try:
            mode = os.stat(path).st_mode
        except OSError:
            mode = stat.S_IFREG
        if not stat.S_ISREG(mode):
            return _describe_type(mode)
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _describe_type(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "folder"),
        (stat.S_ISFIFO, "named pipe"),
        (stat.S_ISCHR, "device"),
        (stat.S_ISBLK, "device"),
        (stat.S_ISSOCK, "socket"),
    )
    kind = next((name for is_kind, name in kinds if is_kind(mode)), "special file")
    return f"it is a {kind}, not a regular file"
