"""Image files in a zip archive, stored or deflated.

The index is read here, not by ``zipfile``: one name that is not valid UTF-8 makes ``zipfile`` refuse the archive.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from llava_twophase.errors import UserError
from llava_twophase.vision.archive_entry import Entry, Kind
from llava_twophase.vision.archives import ImageArchive

# Sections of APPNOTE.TXT: 4.3.7 local header, 4.3.12 central header, 4.3.14 to 4.3.16 end records.
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_MAX_COMMENT = (1 << 16) - 1
_ENCRYPTED, _UTF8 = 1, 1 << 11
_ZIP64_EXTRA = 1


class ImageZip(ImageArchive):
    """Images in a zip archive."""

    def _entries(self) -> Iterator[Entry]:
        try:
            directory, shift, entries = self._central_directory()
            position = count = 0
            while directory[position : position + 4] == b"PK\1\2":
                fields = _CENTRAL.unpack_from(directory, position)
                start = position + _CENTRAL.size
                name_bytes, extra_bytes, comment_bytes = fields[10:13]
                name = directory[start : start + name_bytes]
                extra = directory[start + name_bytes : start + name_bytes + extra_bytes]
                yield _entry(fields, name, extra, shift)
                position = start + name_bytes + extra_bytes + comment_bytes
                count += 1
            if (count ^ entries) & 0xFFFF:
                raise ValueError(f"its index has {entries} files, of which {count} can be read")
        except (OSError, struct.error, ValueError) as error:
            raise UserError(f"--image_folder {self.path} is a damaged zip archive: {error}") from None

    def _central_directory(self) -> tuple[bytes, int, int]:
        # The directory's bytes, how far all offsets are shifted by data before the archive, and the number of files.
        size = self.path.stat().st_size
        tail = self.read_at(max(0, size - _END.size - _MAX_COMMENT), min(size, _END.size + _MAX_COMMENT))
        place = tail.rfind(b"PK\5\6")
        if place < 0:
            raise ValueError("its index is missing")
        _, disk, _, _, entries, directory_bytes, offset, _ = _END.unpack_from(tail, place)
        end = size - len(tail) + place
        if end >= _LOCATOR_64.size and self.read_at(end - _LOCATOR_64.size, 4) == b"PK\6\7":
            record = _LOCATOR_64.unpack(self.read_at(end - _LOCATOR_64.size, _LOCATOR_64.size))[2]
            if self.read_at(record, 4) == b"PK\6\6":
                *_, entries, directory_bytes, offset = _END_64.unpack(self.read_at(record, _END_64.size))
                end = record
        if disk not in (0, 0xFFFF):
            raise ValueError("it is one part of a split archive; join the parts first")
        shift = end - directory_bytes - offset
        if shift < 0:
            raise ValueError("it is truncated at its beginning, or its index is damaged")
        if shift and self.read_at(0, 4) == b"PK\3\4":
            raise ValueError("several archives were joined into one file; unpack them to a folder")
        return self.read_at(end - directory_bytes, directory_bytes), shift, entries

    def _read(self, entry: Any) -> bytes:
        offset, stored, deflated = self._data(entry)
        data = self.read_at(offset, stored)
        if deflated:
            # One byte more than the index says, so that a decompression bomb cannot fill the memory.
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, int(entry["size"]) + 1)
        if len(data) != int(entry["size"]) or zlib.crc32(data) != int(entry["crc"]):
            raise OSError("its checksum is wrong")
        return data

    def _data(self, entry: Any) -> tuple[int, int, bool]:
        offset = int(entry["offset"])
        header = _LOCAL.unpack(self.read_at(offset, _LOCAL.size))
        if header[0] != b"PK\3\4":
            raise OSError("its header is not where the archive's index says")
        name_bytes, extra_bytes = header[9:]
        start = offset + _LOCAL.size + name_bytes + extra_bytes
        return start, int(entry["stored"]), int(entry["kind"]) == Kind.DEFLATED


def _entry(fields: tuple[Any, ...], raw: bytes, extra: bytes, shift: int) -> Entry:
    flags, method, crc, stored, size = fields[3], fields[4], fields[7], fields[8], fields[9]
    size, stored, offset = _wide_sizes(size, stored, fields[16], extra)
    name, others = _decode_name(raw, bool(flags & _UTF8))
    kind = method if method in (Kind.STORED, Kind.DEFLATED) else Kind.UNSUPPORTED
    if flags & _ENCRYPTED:
        kind = Kind.ENCRYPTED
    if name.endswith("/"):
        kind = Kind.FOLDER
    return Entry(name, offset + shift, stored=stored, size=size, crc=crc, kind=kind, other_names=others)


def _wide_sizes(size: int, stored: int, offset: int, extra: bytes) -> tuple[int, int, int]:
    # Values that do not fit 32 bits follow in an extra field, in this order, each only if it does not fit.
    values = [size, stored, offset]
    if 0xFFFFFFFF not in values:
        return size, stored, offset
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == _ZIP64_EXTRA:
            wide = list(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            values = [wide.pop(0) if value == 0xFFFFFFFF and wide else value for value in values]
            break
        position += 4 + length
    return values[0], values[1], values[2]


def _decode_name(raw: bytes, is_utf8: bool) -> tuple[str, tuple[str, ...]]:
    if raw.isascii() and b"\\" not in raw:
        return raw.decode("ascii"), ()
    # Without the flag the encoding is unknown: cp437 by the standard, often UTF-8. Windows tools write backslashes.
    utf8, cp437 = raw.decode("utf-8", "surrogateescape"), raw.decode("cp437")
    name = utf8 if is_utf8 else cp437
    names = [name, utf8, cp437]
    names += [other.replace("\\", "/") for other in names]
    return name, tuple(dict.fromkeys(other for other in names if other != name))
