"""One entry of an archive: where its bytes are, and a file object that reads them piece by piece."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Kind(IntEnum):
    """How the bytes of an entry are stored, or why they cannot be read."""

    STORED = zipfile.ZIP_STORED
    DEFLATED = zipfile.ZIP_DEFLATED
    FOLDER = 200
    ENCRYPTED = 201
    UNSUPPORTED = 202
    BROKEN_LINK = 203
    SPARSE = 204
    SPECIAL = 205


UNREADABLE = {
    Kind.FOLDER: "it is a folder, not a regular file",
    Kind.ENCRYPTED: "cannot be read: it is encrypted in the archive",
    Kind.UNSUPPORTED: "cannot be read: it is compressed with another method than deflate in the archive",
    Kind.BROKEN_LINK: "it is a link to a file that is not in the archive",
    Kind.SPECIAL: "it is a special file, not a regular file",
    Kind.SPARSE: "cannot be read: it is stored as a sparse file in the archive",
}


@dataclass(frozen=True)
class Entry:
    """One file of an archive.

    Attributes:
        name: Its path as the archive spells it, with forward slashes.
        offset: Where its data (tar) or its header (zip) begins.
        stored: Bytes in the archive.
        size: Bytes of the file.
        crc: CRC-32 of the file (zip).
        kind: How the bytes are stored.
        other_names: Other spellings of its name, used if no entry has exactly that name.
    """

    name: str
    offset: int = 0
    stored: int = 0
    size: int = 0
    crc: int = 0
    kind: int = Kind.STORED
    other_names: tuple[str, ...] = ()


class EntryFile(io.RawIOBase):
    """One file of an archive, read and decompressed piece by piece.

    Args:
        read_at: Reads a number of bytes at an offset of the archive.
        size: Bytes of the file.
        offset: Where its stored bytes begin.
        stored: Their number.
        deflated: Whether they are deflated.
    """

    def __init__(
        self, read_at: Callable[[int, int], bytes], size: int, offset: int, stored: int, deflated: bool
    ) -> None:
        super().__init__()
        self._read_at = read_at
        self._size = size
        self._offset = offset
        self._stored = stored
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if deflated else None
        self._position = 0  # in the file
        self._taken = 0  # of the stored bytes

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in the file."""
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position; backwards in a deflated file, decompression starts again."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        target = min(max(0, start + position), self._size)
        if self._inflate is None:
            self._position = self._taken = target
            return target
        if target < self._position:
            self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            self._position = self._taken = 0
        while self._position < target and self.read(min(1 << 16, target - self._position)):
            pass
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read bytes into a buffer and return their number; 0 at the end.

        Raises:
            OSError: The archive is truncated or damaged.
        """
        count = min(len(buffer), self._size - self._position)
        data = self._next(count) if count > 0 else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _next(self, count: int) -> bytes:
        if self._inflate is None:
            self._taken += count
            return self._read_at(self._offset + self._taken - count, count)
        pending = self._inflate.unconsumed_tail
        try:
            while True:
                if not pending:
                    piece = min(1 << 14, self._stored - self._taken)
                    pending = self._read_at(self._offset + self._taken, piece)
                    self._taken += piece
                data = self._inflate.decompress(pending, count)
                if data or self._inflate.eof or self._taken == self._stored:
                    return data
                pending = self._inflate.unconsumed_tail
        except zlib.error as error:
            raise OSError(str(error)) from None
