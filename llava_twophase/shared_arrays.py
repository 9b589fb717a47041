"""Arrays that are made once, kept in a file, and memory-mapped: the processes of a machine share one copy.

A file has one block with a JSON line (dtype, shape and offset of each array), then the arrays. It is written under
another name and renamed. Its name is given by what the arrays are derived from, so a file is never out of date.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from llava_twophase.files import free_bytes, replace_file, update_digest
from llava_twophase.text import format_bytes

logger = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]

_FORMAT = "llava-twophase-arrays-1"
_BLOCK = 4096
_ALIGNMENT = 64
_DIGEST = 32  # hexadecimal digits of an XXH3-128, before the JSON line
_LOCK = "lock"
_SPARE = 1 << 28  # bytes that stay free on the disk, which may have the user's home
_PIECE = 1 << 26
# Files that were not opened for so long are removed when another one is made.
_DAY = 86400.0
_KEPT_SECONDS = 30 * _DAY


def user_cache(name: str) -> Path:
    """Return the folder for one kind of derived data, in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    A user without a home folder has it in the folder for temporary files.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava-twophase" / name
    except RuntimeError:  # a container's user that has neither HOME nor an entry in /etc/passwd
        return Path(tempfile.gettempdir()) / f"llava-twophase-{os.getuid()}" / name


def shared_arrays(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays of a file, memory-mapped and read-only; make the file if there is none.

    One process makes it, and others that need it at the same time wait. A file that is truncated or does not match its
    checksum is made again. If the folder cannot be written, or its disk would be nearly full, a warning says so and the
    arrays are those of ``make``, in this process's own memory: the object that ``make`` returned.

    Args:
        path: The file. Its name identifies what the arrays are derived from, and its folder is for such files only. A
            folder that does not exist is created for this user alone.
        make: Returns the arrays.

    Raises:
        Exception: Whatever ``make`` raises; nothing is written then.
    """
    found = _open(path)
    if found is not None:
        return found
    with _locked(path) as writable:
        found = _open(path)
        if found is not None:
            return found
        arrays = make()
        # Without locks, another process may have made the file, and replacing it would take it from those that map it.
        found = _open(path)
        if found is not None:
            return found
        if not writable or not _write(path, arrays):
            return arrays
    return _open(path) or arrays


def release_pages(arrays: Arrays) -> None:
    """Unmap the pages of mapped arrays that were read once: they count as memory of each process that has touched them.

    They stay in the page cache, and are mapped again when they are read. Arrays in memory are left alone.
    """
    for array in arrays.values():
        base: Any = array
        while isinstance(base, (np.ndarray, memoryview)):
            base = base.base if isinstance(base, np.ndarray) else base.obj
        if isinstance(base, mmap.mmap):
            base.madvise(mmap.MADV_DONTNEED)


def _open(path: Path) -> Arrays | None:
    # The checksum is computed from what is read: a disk error in mapped pages would end the process.
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(_BLOCK)
            digest = xxhash.xxh3_128(head[_DIGEST:])
            update_digest(digest, file)
            if digest.hexdigest().encode("ascii") != head[:_DIGEST]:
                return None
            arrays = _arrays(mmap.mmap(file.fileno(), file.tell(), access=mmap.ACCESS_READ), head, path.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not isinstance(error, FileNotFoundError):
            logger.debug("%s cannot be used: %s", path, error)
        return None
    with suppress(OSError):  # it is in use; a folder of another user cannot be changed
        # Not at each opening: clients of a network file system drop the pages of a file that changes.
        if _age(path) > _DAY:
            os.utime(path)
    return arrays


def _arrays(mapped: mmap.mmap, head: bytes, name: str) -> Arrays | None:
    content = json.loads(head[_DIGEST:])
    if content["format"] != _FORMAT or content["name"] != name:
        return None
    return {
        array: np.frombuffer(mapped, entry["dtype"], prod(entry["shape"]), entry["offset"]).reshape(entry["shape"])
        for array, entry in content["arrays"].items()
    }


def _write(path: Path, arrays: Arrays) -> bool:
    try:
        _require_space(path.parent, arrays)
        with replace_file(path, unique=True) as file:
            _write_arrays(file, path.name, arrays)
    except OSError as error:
        _warn(path, error)
        return False
    return True


def _require_space(folder: Path, arrays: Arrays) -> None:
    needed, free = sum(array.nbytes for array in arrays.values()) + _SPARE, free_bytes(folder)
    if free < needed:
        sizes = f"{format_bytes(free, 1)} are free, and {format_bytes(needed, 1)} are needed"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}")


def _write_arrays(file: IO[bytes], name: str, arrays: Arrays) -> None:
    entries: dict[str, dict[str, Any]] = {}
    offset = _BLOCK
    for key, array in arrays.items():
        entries[key] = {"dtype": array.dtype.str, "shape": list(array.shape), "offset": offset}
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    line = json.dumps({"format": _FORMAT, "name": name, "arrays": entries}).encode("ascii")
    block = line.ljust(_BLOCK - _DIGEST)
    if len(block) != _BLOCK - _DIGEST:
        raise ValueError(f"the description of {len(arrays)} arrays has {len(line)} bytes, which do not fit")
    digest = xxhash.xxh3_128(block)
    file.write(bytes(_DIGEST) + block)
    for array in arrays.values():
        values = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        for start in range(0, len(values), _PIECE):
            digest.update(values[start : start + _PIECE])
            file.write(values[start : start + _PIECE])
        padding = bytes(-len(values) % _ALIGNMENT)
        digest.update(padding)
        file.write(padding)
    file.seek(0)
    file.write(digest.hexdigest().encode("ascii"))


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    # Yields whether files can be made in the folder. The lock ends with the process.
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path.parent / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        _warn(path, error)
        yield False
        return
    try:
        if _wait_for(descriptor, path):
            _remove_leftovers(path.parent)
        yield True
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, path: Path) -> bool:
    # False on a file system without locks: several processes may then make the same arrays.
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process, which writes to %s", path.parent)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        logger.debug("%s cannot be locked: %s", path.parent, error)
        return False
    return True


def _remove_leftovers(folder: Path) -> None:
    # What a killed process wrote, and files that nobody has opened for a long time. Locks may belong to one machine:
    # a process on another one may be writing.
    for file in folder.iterdir():
        with suppress(OSError):
            if file.name != _LOCK and _age(file) > (_DAY if file.suffix == ".tmp" else _KEPT_SECONDS):
                file.unlink()


def _age(file: Path) -> float:
    return time.time() - file.stat().st_mtime


def _warn(path: Path, error: OSError) -> None:
    logger.warning(
        "%s cannot be written (%s): each process keeps a copy in its own memory; set XDG_CACHE_HOME to a folder that "
        "can be written to share one copy",
        path.parent,
        error.strerror or error,
    )
