"""Files and disks: atomic replacement, durable renames, free space, and operating system errors with advice."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any

import xxhash

from llava_twophase.errors import UserError
from llava_twophase.text import format_bytes

_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_PERMITTED = (errno.EROFS, errno.EACCES, errno.EPERM)
_GONE = (errno.ENOENT, errno.ESTALE)
_DISK = (*_FULL, errno.EROFS, errno.ESTALE, errno.EIO, errno.EFBIG)
# With less free space than this, an error without a number is reported as a full disk.
_NEARLY_FULL = 2**20
_PIECE = 1 << 22


@contextmanager
def replace_file(path: Path, mode: str = "wb", unique: bool = False) -> Iterator[IO[Any]]:
    """Write a file that replaces ``path`` when the block ends: readers see the old content or the new one.

    The content is written to ``<name>.tmp`` in the same folder, synced and renamed, and the folder is synced. An
    exception in the block removes the temporary file and leaves ``path`` unchanged.

    Args:
        path: The file to replace or create.
        mode: ``wb``, or ``w`` for UTF-8 text. Text that UTF-8 cannot encode (surrogates, from a command line that was
            not UTF-8) is written as backslash escapes, which JSON reads back.
        unique: Put the machine's name and the process id into the temporary file's name, for files that several
            processes may replace at once. Without it, an interrupted process leaves at most one temporary file.

    Yields:
        The open temporary file.
    """
    process = f"{os.uname().nodename}.{os.getpid()}"
    temporary = path.with_name(f".{path.name}.{process}.tmp" if unique else f"{path.name}.tmp")
    text = mode == "w"
    try:
        with temporary.open(
            mode, encoding="utf-8" if text else None, errors="backslashreplace" if text else None
        ) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def update_digest(digest: xxhash.xxh3_128, file: FileIO) -> None:
    """Update a checksum with the rest of a file, in pieces of 4 MiB."""
    block = memoryview(bytearray(_PIECE))
    while size := file.readinto(block):
        digest.update(block[:size])


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable.

    File systems that cannot sync a folder (CIFS, 9p, some FUSE) are accepted: their renames are as durable as they
    can be.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, or of its nearest parent that exists."""
    return shutil.disk_usage(_existing(folder)).free


def require_free_space(folder: Path, needed: int, what: str, advice: str) -> None:
    """Check that something fits on the disk of a folder.

    Args:
        folder: Where it will be written; it need not exist yet.
        needed: Bytes.
        what: What needs them.
        advice: What the user can do.

    Raises:
        UserError: It does not fit; the message gives both sizes.
    """
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{format_bytes(needed)} are needed for {what}, but the disk of {folder} has {format_bytes(free)} free; "
            f"{advice}"
        )


def require_writable(folder: Path, flag: str) -> None:
    """Check that a folder can be written, or created.

    Args:
        folder: The folder; it need not exist yet.
        flag: The command-line flag that gave it.

    Raises:
        UserError: It cannot.
    """
    parent = _existing(folder)
    if not parent.is_dir():
        raise UserError(f"{flag} {folder} cannot be written: {parent} is not a folder; give another {flag}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder} cannot be written: {parent} is read-only; give another {flag}")


@contextmanager
def explain_os_errors(
    folder: Path, flag: str, advice: Callable[[], str], also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn errors of the disk that a folder is on into a ``UserError`` that says what to do.

    Args:
        folder: The folder that the block writes to.
        flag: The command-line flag that gave it.
        advice: Returns what to do once the cause is fixed; called only after an error.
        also: Further exceptions that libraries raise on a full disk; they are explained only if the disk is full.

    Raises:
        UserError: The disk is full, or a file in the folder cannot be written. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, *also)):
            raise
        problem = _problem(folder, flag, error)
        if problem is None:
            raise
        raise UserError(f"{problem}, then {advice()} ({error})") from error


def _problem(folder: Path, flag: str, error: Exception) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    # Libraries report a full disk in their own words, without an error number.
    if number in _FULL or number is None and free_bytes(folder) < _NEARLY_FULL:
        return f"the disk of {flag} {folder} is full: free some space"
    if not isinstance(error, OSError) or not _concerns(folder, error):
        return None
    if number in _NOT_PERMITTED:
        return f"{flag} {folder} cannot be written: make it writable or give another {flag}"
    if number in _GONE or not folder.exists():
        return f"{flag} {folder} was deleted or moved during the run: move it back if it still exists"
    return f"{flag} {folder} cannot be written: fix the cause"


def _concerns(folder: Path, error: OSError) -> bool:
    # The error of a write to an open file has no path: only its number shows that a disk is the cause. h5py puts the
    # path into its message.
    if error.filename is None:
        return error.errno in _DISK or str(folder) in str(error)
    path = os.path.abspath(os.fsdecode(error.filename))
    return Path(path).is_relative_to(os.path.abspath(folder))


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
