"""Pictures straight from a zip or tar archive, without unpacking; knows nothing of what is in them.

An archive is indexed once, when it is first asked for a picture. The index is one array, 45 bytes for each file, that
forked worker processes share; names are kept as hashes of 128 bits, which never collide by chance.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from llava_twophase.errors import UserError
from llava_twophase.vision.images import BadImage

# The name's hash in two halves, then where its bytes lie and what they are.
_ENTRY = np.dtype(
    [
        ("high", "<u8"),
        ("low", "<u8"),
        ("offset", "<u8"),
        ("stored", "<u8"),
        ("size", "<u8"),
        ("crc", "<u4"),
        ("kind", "u1"),
    ]
)
_LOCAL = struct.Struct("<4s5H3L2H")  # a zip entry's local header (APPNOTE.TXT 4.3.7)
_ENCRYPTED = 1
_UNUSABLE = 255


def open_archive(path: Path) -> ImageArchive:
    """Open a zip or an uncompressed tar.

    Raises:
        UserError: It is neither, or a compressed tar.
    """
    try:
        if zipfile.is_zipfile(path):
            return ImageZip(path)
        with tarfile.open(path, "r:"):
            pass
        return ImageTar(path)
    except (tarfile.ReadError, zipfile.BadZipFile) as error:
        hint = ""
        if path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            hint = "; a compressed tar has no random access: decompress it to .tar, or unpack it to a folder"
        raise UserError(f"--image_folder {path} is no zip or uncompressed tar archive: {error}{hint}") from None
    except OSError as error:
        raise UserError(f"--image_folder {path} cannot be read: {error.strerror or error}") from None


class ImageArchive:
    """What zip and tar share: the index, and which of its names a key means.

    A key is a file's path in the archive. Where all files lie below one top folder and the records do not name it
    (``images.zip`` made of a folder ``images``), it is added.

    Args:
        path: The archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor, self._owner = -1, 0
        self._index: np.ndarray | None = None

    def prepare(self) -> None:
        """Index the archive, so that worker processes forked from here on need not."""
        self._entries_by_hash()

    def _entries_by_hash(self) -> np.ndarray:
        if self._index is not None:
            return self._index
        rows, top = [], set()
        for name, *entry in self._entries():
            name = name.removeprefix("./")
            if name.startswith("__MACOSX/"):
                continue
            rows.append((*_hash(name), *entry))
            top.add(name.partition("/")[0] if "/" in name else "")
        if not rows:
            raise UserError(f"--image_folder {self.path} holds no files")
        # Stable, so that of two files with one name the later one stands last, and counts.
        index = np.array(rows, _ENTRY)
        self._index = index = index[np.lexsort((index["low"], index["high"]))]
        self._hashes = np.ascontiguousarray(index["high"])
        self._top = f"{top.pop()}/" if len(top) == 1 else ""
        return index

    def missing(self, keys: Iterable[str]) -> list[str]:
        """List the keys without a file, in their order."""
        return [key for key in keys if self._find(key) is None]

    def read(self, key: str) -> bytes:
        """Read a file.

        Raises:
            BadImage: It is not there, empty, encrypted, or damaged.
        """
        found = self._find(key)
        if found is None:
            raise BadImage("cannot be read: No such file in the archive")
        try:
            data = self._read(found)
        except (OSError, zlib.error, struct.error) as error:
            raise BadImage(f"cannot be read from the archive: {error}") from None
        if not data:
            raise BadImage("the file is empty")
        return data

    def open(self, key: str) -> BinaryIO:
        """Read a file and wrap it as one.

        Raises:
            BadImage: It is not there, empty, encrypted, or damaged.
        """
        return io.BytesIO(self.read(key))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind when pickled."""
        return {**self.__dict__, "_descriptor": -1, "_owner": 0}

    def _entries(self) -> Iterator[tuple[Any, ...]]:
        raise NotImplementedError

    def _read(self, entry: Any) -> bytes:
        raise NotImplementedError

    def _find(self, key: str) -> Any | None:
        index = self._entries_by_hash()
        for name in (key, self._top + key) if self._top else (key,):
            high, low = _hash(name)
            position = int(np.searchsorted(self._hashes, np.uint64(high), side="right")) - 1
            while position >= 0 and self._hashes[position] == high:
                if index["low"][position] == low:
                    return index[position]
                position -= 1
        return None

    def _pread(self, count: int, offset: int) -> bytes:
        if self._owner != os.getpid():  # each process its own
            self._descriptor, self._owner = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), os.getpid()
        data = os.pread(self._descriptor, count, offset)
        if len(data) < count:
            raise OSError("the archive is truncated")
        return data


class ImageZip(ImageArchive):
    """Pictures in a zip archive, stored or deflated."""

    def _entries(self) -> Iterator[tuple[Any, ...]]:
        with zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    kind = _UNUSABLE if info.flag_bits & _ENCRYPTED else info.compress_type
                    yield (info.filename, info.header_offset, info.compress_size, info.file_size, info.CRC, kind)

    def _read(self, entry: Any) -> bytes:
        kind = int(entry["kind"])
        if kind not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadImage("is encrypted or compressed in another way than deflate in the archive")
        offset = int(entry["offset"])
        header = _LOCAL.unpack(self._pread(_LOCAL.size, offset))
        if header[0] != b"PK\3\4":
            raise OSError("its header is not where the archive's index says")
        name_bytes, extra_bytes = header[9:]
        data = self._pread(int(entry["stored"]), offset + _LOCAL.size + name_bytes + extra_bytes)
        if kind == zipfile.ZIP_DEFLATED:
            # One byte more than it claims, so that a bomb cannot fill the memory.
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, int(entry["size"]) + 1)
        if len(data) != int(entry["size"]) or zlib.crc32(data) != int(entry["crc"]):
            raise OSError("its checksum is wrong")
        return data


class ImageTar(ImageArchive):
    """Pictures in an uncompressed tar archive."""

    def _entries(self) -> Iterator[tuple[Any, ...]]:
        with tarfile.open(self.path, "r:", encoding="utf-8") as archive:
            for member in archive:
                if member.isreg():
                    yield (member.name, member.offset_data, member.size, member.size, 0, 0)
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep an object for each file

    def _read(self, entry: Any) -> bytes:
        return self._pread(int(entry["size"]), int(entry["offset"]))


def _hash(name: str) -> tuple[int, int]:
    digest = xxhash.xxh3_128_intdigest(name.encode("utf-8", "surrogateescape"))
    return digest >> 64, digest & (1 << 64) - 1
