"""A sealed shard, wherever its bytes are: its header, datasets and rows, by offset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
import xxhash

from llava_twophase.cache.format import USER_BLOCK
from llava_twophase.cache.header import Header, StoredDataset, decode_header
from llava_twophase.errors import UserError

_LFS_POINTER = b"version https://git-lfs"


class Shard(ABC):
    """One shard, open for reading.

    Attributes:
        path: The file, or its URL.
        size: Its length in bytes.
    """

    path: str
    size: int

    @abstractmethod
    def read_into(self, view: memoryview, offset: int) -> None:
        """Read bytes into the caller's memory.

        Raises:
            UserError: They cannot be read, or the file ends before them.
        """

    def will_need(self, offset: int, count: int) -> None:
        """Ask the system to start reading bytes; systems that cannot do this ignore it."""
        return

    def changed(self) -> str:
        """Return how the file differs from when it was opened; empty if that is not known."""
        return ""

    def distrust(self) -> None:
        """Forget a copy of the bytes that was made on this machine: a row does not match its checksum."""
        return

    def header_block(self) -> bytes:
        """Read the user block; it is shorter than ``USER_BLOCK`` bytes if the file is.

        Raises:
            UserError: It cannot be read, or the file is a Git LFS pointer.
        """
        block = bytearray(min(USER_BLOCK, self.size))
        self.read_into(memoryview(block), 0)
        if block.startswith(_LFS_POINTER):
            raise UserError(f"{self.path} is a Git LFS pointer; git lfs pull downloads the shard")
        return bytes(block)

    def header(self) -> Header:
        """Read the header and check that the file has the length that it states.

        Raises:
            UserError: The file is not a shard of this format version, is damaged, or has another length.
        """
        header = decode_header(self.header_block(), self.path)
        if self.size != header.file_bytes:
            raise UserError(f"{self.path} is truncated or too long: {self.size} bytes, expected {header.file_bytes}")
        return header

    def read_bytes(self, data: StoredDataset) -> bytes:
        """Read the bytes of a dataset."""
        return self.read_dataset(data).tobytes()

    def read_dataset(self, data: StoredDataset) -> np.ndarray:
        """Read a dataset into a new array."""
        raw = np.empty(data.nbytes, np.uint8)
        self.read_into(memoryview(raw), data.offset)
        return raw.view(data.numpy_dtype).reshape(data.shape)

    def read_rows_into(self, header: Header, first: int, rows: np.ndarray) -> None:
        """Read consecutive rows.

        Args:
            header: The shard's header.
            first: The first row.
            rows: Memory for the stored rows, ``uint8 [B, row_bytes]``, C-contiguous.
        """
        begin = 0
        for part in header.row_parts:
            is_only_part = part.row_bytes == rows.shape[1]
            raw = rows if is_only_part else np.empty((len(rows), part.row_bytes), np.uint8)
            self.read_into(memoryview(raw.reshape(-1)), part.offset + first * part.row_bytes)
            if not is_only_part:
                rows[:, begin : begin + part.row_bytes] = raw
            begin += part.row_bytes

    def checksum_around(self, header: Header) -> str:
        """Return what the header's ``xxh3_128`` must be, from the bytes of the file."""

        def read(count: int, offset: int) -> bytes:
            data = bytearray(count)
            self.read_into(memoryview(data), offset)
            return bytes(data)

        return checksum_around(read, header)


def checksum_around(read: Callable[[int, int], bytes], header: Header) -> str:
    """Return the XXH3-128 (hex) of all bytes after the user block, except those of ``/features`` and ``/scale``.

    Args:
        read: Returns so many bytes from an offset.
        header: Where the features are, and where the file ends.
    """
    digest = xxhash.xxh3_128()
    for start, stop in ranges_around(header):
        for position in range(start, stop, 1 << 20):
            digest.update(read(min(1 << 20, stop - position), position))
    return digest.hexdigest()


def ranges_around(header: Header) -> Iterator[tuple[int, int]]:
    """Yield start and stop of all bytes after the user block, except those of ``/features`` and ``/scale``."""
    position = USER_BLOCK
    for part in sorted(header.row_parts, key=lambda data: data.offset):
        yield position, part.offset
        position = part.offset + part.nbytes
    yield position, header.file_bytes
