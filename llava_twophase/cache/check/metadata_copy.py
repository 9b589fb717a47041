"""A local file for libhdf5, which reads no URLs: the metadata of a remote shard, without its features."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_twophase.cache.header import Header
from llava_twophase.cache.local import ShardFile
from llava_twophase.cache.shard import Shard, ranges_around


@contextmanager
def local_metadata(shard: Shard, header: Header) -> Iterator[Path]:
    """Give a shard's HDF5 metadata as a file of this machine.

    Args:
        shard: The shard.
        header: Its header.

    Yields:
        The shard itself if it is on this machine. Otherwise a sparse copy with zeros instead of features, which takes
        the disk space of its metadata, keys and checksums, and is removed afterwards.
    """
    if isinstance(shard, ShardFile):
        yield Path(shard.path)
        return
    with tempfile.NamedTemporaryFile(suffix=".h5") as file:
        file.write(shard.header_block())
        for start, stop in ranges_around(header):
            part = bytearray(stop - start)
            shard.read_into(memoryview(part), start)
            file.seek(start)
            file.write(part)
        file.truncate(header.file_bytes)
        file.flush()
        yield Path(file.name)
