"""The folder that an extraction writes to: who may, what a killed run left, and disk errors explained."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_twophase.cache.format import MANIFEST, SHARDS
from llava_twophase.cache.manifest import Manifest, read_manifest
from llava_twophase.errors import UserError
from llava_twophase.extract.plan import free_bytes

logger = logging.getLogger(__name__)


def existing_manifest(cache: Path) -> Manifest | None:
    """Read the manifest of a cache that is there; None for a new or empty folder.

    Raises:
        UserError: The folder holds something else, or its manifest is damaged.
    """
    if (cache / MANIFEST).is_file():
        return read_manifest(cache)
    if cache.exists() and (not cache.is_dir() or any(path.name not in _OURS for path in cache.iterdir())):
        raise UserError(f"--feature_cache {cache} exists and is no feature cache; give a new or empty folder")
    return None


def require_writable(cache: Path) -> None:
    """Check that a cache's folder can be written, or made.

    Raises:
        UserError: It cannot.
    """
    folder = cache
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--feature_cache {cache} cannot be written: {folder} is read-only for you; give another one")


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Make the cache's folders and hold them against a second extraction; readers need no lock.

    The lock ends with the process, however it ends. Where the filesystem knows none (some NFS and Lustre mounts), it is
    the user who must not run two.

    Raises:
        UserError: Another extraction is writing to the cache.
    """
    (cache / SHARDS).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(cache / SHARDS, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another extraction is writing to {cache}; wait for it, or end it") from None
    except OSError as error:
        logger.debug("%s cannot be locked: %s", cache, error)
    try:
        yield
    finally:
        os.close(descriptor)


def remove_work_files(cache: Path) -> None:
    """Remove what a killed run left unfinished; only the one that holds the lock may."""
    for path in [*cache.glob("*.tmp"), *(cache / SHARDS).glob("*.tmp")]:
        path.unlink(missing_ok=True)


@contextmanager
def explained(cache: Path) -> Iterator[None]:
    """Turn an error of the disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{_advice(cache, error)} ({error})") from error


def _advice(cache: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(cache) / 1e9
        return (
            f"the disk of {cache} is full, {free:.3f} GB free: sealed shards stay valid; "
            "free some space and run the same command again"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{cache} cannot be written: make it writable, or give another --feature_cache"
    if error.errno in (errno.ENOENT, errno.ESTALE) or not cache.exists():
        return f"{cache} was deleted or moved while it was written; run the same command again to make it anew"
    return f"{cache} cannot be written: sealed shards stay valid; mend the cause and run the same command again"


_OURS = (SHARDS, f"{MANIFEST}.tmp")
