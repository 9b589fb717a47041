"""A lock on ``--output_dir``: two runs in one folder would overwrite each other's checkpoints."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_twophase.errors import UserError
from llava_twophase.train.loop.agreement import on_main_rank

logger = logging.getLogger(__name__)

# Data loader workers of a killed run hold its lock until they notice that their parent is gone.
_PATIENCE_SECONDS = 6.0


@contextmanager
def output_lock(folder: Path) -> Iterator[None]:
    """Lock a run's folder from rank 0; the lock ends with the process, however it ends.

    No file is written. On file systems without locks (some NFS and Lustre mounts) nothing is locked.

    Args:
        folder: The folder of the run, which exists.

    Raises:
        UserError: Another run holds the lock.
    """
    held: list[int] = []
    on_main_rank(lambda: _lock(folder, held))
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _lock(folder: Path, held: list[int]) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise UserError(
                    f"another training run is writing to --output_dir {folder}; wait for it, or give another folder"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            logger.debug("%s cannot be locked: %s", folder, error)
            break
    held.append(descriptor)
