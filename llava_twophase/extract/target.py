"""The folder that an extraction writes to: who may, what a killed run left, and disk errors explained."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from llava_twophase.cache.format import MANIFEST, SHARDS
from llava_twophase.cache.manifest import Manifest, read_manifest
from llava_twophase.errors import UserError
from llava_twophase.files import explain_os_errors

logger = logging.getLogger(__name__)


def existing_manifest(cache: Path) -> Manifest | None:
    """Read the manifest of a cache that is there; None for a new or empty folder.

    Raises:
        UserError: The folder holds something else, or its manifest is damaged.
    """
    if (cache / MANIFEST).is_file():
        return read_manifest(cache)
    if cache.exists() and (not cache.is_dir() or any(path.name not in _OURS for path in cache.iterdir())):
        raise UserError(f"--feature_cache {cache} exists and is not a feature cache; give a new or empty folder")
    return None


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


def explain_disk_errors(cache: Path) -> AbstractContextManager[None]:
    """Return a context that turns an error of the cache's disk into one that says what to do."""
    return explain_os_errors(
        cache, "--feature_cache", lambda: "run the same command again: sealed shards are kept and not extracted again"
    )


_OURS = (SHARDS, f"{MANIFEST}.tmp")
