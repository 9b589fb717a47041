"""Columns of large data files, kept in the user's cache folder for later starts and for the other processes of a node.

A file belongs to the content of one data file: its name has the XXH3-128 of all bytes, and a checksum of what else
decides the columns.
"""

from __future__ import annotations

import io
import logging
import os
import tempfile
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from llava_twophase.errors import UserError
from llava_twophase.files import update_digest
from llava_twophase.records.builder import Built
from llava_twophase.records.columns import DTYPES, Columns
from llava_twophase.records.parquet import is_parquet
from llava_twophase.shared_arrays import Arrays, shared_arrays, user_cache
from llava_twophase.text import format_bytes

logger = logging.getLogger(__name__)

Build = Callable[[Mapping[str, IO[bytes]]], Built]
"""Appends the records of a data file to open files, one for each column; a ``UserError`` means bad input."""

# The modules outside this folder that read and check data files.
_READERS = ("constants.py", "json_file.py", "json_list.py")


class _NotKept(Exception):
    """Columns that each process builds for itself: those of ``arrays``, or they are still to be built."""

    def __init__(self, arrays: Arrays | None = None) -> None:
        super().__init__()
        self.arrays = arrays


def build_in_memory(build: Build) -> Columns:
    """Return the columns of a data file without a file for them."""
    return Columns.of(_in_memory(build)[0])


def keep_columns(path: Path, build: Build) -> Columns:
    """Return the columns of a data file, from an earlier start if its content is the same.

    They are kept below ``$XDG_CACHE_HOME/llava-twophase/records`` (``~/.cache`` by default), in about half the size of
    the data file, as ``shared_arrays`` does. That folder may be deleted.

    Args:
        path: The data file, which exists.
        build: Reads and checks it.

    Raises:
        UserError: The file cannot be read or has bad records, or it changed while it was read.
    """
    digest = _file_digest(path)
    kept = user_cache("records") / f"{digest}-{_rules(path)}"
    made: list[Arrays] = []

    def make() -> Arrays:
        made.append(_make(kept, path, digest, build))
        return made[0]

    try:
        arrays = shared_arrays(kept, make)
    except _NotKept as result:
        return Columns.of(result.arrays or _build_apart(kept, path, digest, build))
    return Columns.of(arrays, kept=None if made and arrays is made[0] else kept)


def _make(kept: Path, path: Path, digest: str, build: Build) -> Arrays:
    """Build while other processes wait. If there is nothing to keep, a mark tells them to build at the same time."""
    mark = _mark(kept)
    if os.path.exists(mark):
        raise _NotKept
    logger.info("reading the records of %s (%s); later starts are faster", path, format_bytes(path.stat().st_size, 1))
    try:
        arrays, built = _build(kept.parent, path, digest, build)
    except UserError:
        _touch(mark)
        raise
    if built.has_absolute_paths:
        # Image keys depend on the image folder and on links to it.
        logger.info("%s has absolute image paths, so it is read again at each start, by each process", path)
        _touch(mark)
        raise _NotKept(arrays)
    return arrays


def _build_apart(kept: Path, path: Path, digest: str, build: Build) -> Arrays:
    logger.info("reading the records of %s", path)
    arrays, built = _build(kept.parent, path, digest, build)
    if not built.has_absolute_paths:
        # The error depended on more than the file, such as a package that was missing: the next start keeps it.
        with suppress(OSError):
            _mark(kept).unlink(missing_ok=True)
    return arrays


def _build(folder: Path, path: Path, digest: str, build: Build) -> tuple[Arrays, Built]:
    arrays, built = _in_files(folder, build)
    if _file_digest(path) != digest:
        raise UserError(f"{path} changed while it was read; run the command again when it is complete")
    return arrays, built


def _mark(kept: Path) -> Path:
    return kept.with_name(f"{kept.name}.apart")


def _touch(mark: Path) -> None:
    with suppress(OSError):
        mark.touch()


def _rules(path: Path) -> str:
    """Return a checksum of what decides the columns of a content: a change of it makes earlier files unused."""
    # Python's Unicode tables decide the words and the normal forms of captions.
    digest = xxhash.xxh3_64(unicodedata.unidata_version.encode("ascii"))
    folder = Path(__file__).parent
    for file in [*sorted(folder.glob("*.py")), *(folder.parent / name for name in _READERS)]:
        digest.update(file.read_bytes())
    if is_parquet(path):
        with suppress(PackageNotFoundError):  # reading the file reports it
            digest.update(version("pyarrow").encode())
    return digest.hexdigest()


def _in_files(folder: Path, build: Build) -> tuple[Arrays, Built]:
    """Build in mapped files without a name, whose pages the system can write back: memory does not grow."""
    problems: list[str] = []
    for place in (folder, None):
        try:
            with ExitStack() as stack:
                files = {name: stack.enter_context(tempfile.TemporaryFile(dir=place)) for name in DTYPES}
                built = build(files)
                for file in files.values():
                    file.flush()
                arrays = {name: np.memmap(files[name], dtype, "r") for name, dtype in DTYPES.items()}
                return {**arrays, **built.arrays()}, built
        except OSError as error:
            problems.append(f"{place or 'the folder for temporary files'}: {error.strerror or error}")
            logger.info("records cannot be built in %s; reading them again", problems[-1])
    logger.warning("the records are read into this process's memory: they cannot be built in %s", "; ".join(problems))
    return _in_memory(build)


def _in_memory(build: Build) -> tuple[Arrays, Built]:
    files = {name: io.BytesIO() for name in DTYPES}
    built = build(files)
    arrays = {name: np.frombuffer(files[name].getvalue(), dtype) for name, dtype in DTYPES.items()}
    return {**arrays, **built.arrays()}, built


def _file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb", buffering=0) as file:
            update_digest(digest, file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
