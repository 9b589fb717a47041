"""Image files in a zip or tar archive, read without unpacking.

An archive is indexed once, when it is first asked for an image. The index is one array of 45 bytes per file, which
forked worker processes share; names are kept as 128-bit hashes, which do not collide by chance.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from llava_twophase.errors import UserError
from llava_twophase.vision.archive_entry import UNREADABLE, Entry, EntryFile, Kind
from llava_twophase.vision.images import OUT_OF_MEMORY, BadImage
from llava_twophase.vision.sources import MISSING, ImageSource, fold_name, require_size

# The name's hash in two halves, then where the file's bytes are and how they are stored.
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
# Keys from which the folder inside the archive is found.
_SAMPLE_KEYS = 32
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_archive(path: Path, keys: Iterable[str] = ()) -> ImageSource:
    """Open a zip or an uncompressed tar.

    Args:
        path: The archive.
        keys: Image keys; see ``open_images``.

    Raises:
        UserError: It is neither, or it is damaged or compressed.
    """
    from llava_twophase.vision.tar_archive import ImageTar
    from llava_twophase.vision.zip_archive import ImageZip

    try:
        # Tar first: a zip is recognised by its end, and the last file of an uncompressed tar may be a zip.
        try:
            with tarfile.open(path, "r:"):
                pass
            return ImageTar(path, keys)
        except tarfile.ReadError as error:
            reason = str(error)
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"--image_folder {path} cannot be read: {error.strerror or error}") from None
    if zipfile.is_zipfile(path):
        return ImageZip(path, keys)
    if start == b"PK\3\4":
        raise UserError(f"--image_folder {path} is a truncated zip archive: its index is missing; download it again")
    hint = ""
    if path.name.endswith(_COMPRESSED_TARS):
        hint = "; a compressed tar has no random access: decompress it to .tar, or unpack it to a folder"
    raise UserError(f"--image_folder {path} is not a zip or uncompressed tar archive: {reason}{hint}")


class ImageArchive:
    """The index of a zip or tar archive, and the rules by which a key finds an entry.

    A key is a path relative to some folder inside the archive. If no entry has exactly the keys' names, the folder is
    searched below which they are. Exact names win over other Unicode normalisation forms and other encodings of a name.
    Of several entries with one name the last one is used, as by unpacking.

    Args:
        path: The archive.
        keys: Image keys, from which the folder is found.
    """

    def __init__(self, path: Path, keys: Iterable[str] = ()) -> None:
        self.path = path
        self._descriptor, self._owner = -1, 0
        self._index: np.ndarray | None = None
        self._hashes = np.empty(0, np.uint64)
        self._folders: list[str] = []
        self._prefix: str | None = None  # the folder inside the archive that keys are relative to
        self._problem = ""  # why there is none
        self._sample = _spread(list(keys))

    def prepare(self) -> None:
        """Index the archive, so that worker processes that are forked from now on share the index."""
        self._entries_by_hash()

    def missing(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the keys that have no entry, in their order, with a reason for each."""
        keys = list(keys)
        self._sample = self._sample or _spread(keys)
        absent = [key for key in keys if self._find(key) is None]
        hints = self._similar_names(absent) if absent and not self._problem else {}
        return {key: MISSING + hints.get(key, self._problem and f"; {self._problem}") for key in absent}

    def read(self, key: str) -> bytes:
        """Read a file.

        Raises:
            BadImage: It is missing, empty, encrypted, or damaged.
        """
        entry = self._require(key)
        require_size(int(entry["size"]))
        try:
            data = self._read(entry)
        except (OSError, zlib.error, struct.error) as error:
            raise BadImage(f"cannot be read from the archive: {error}") from None
        except MemoryError:
            raise BadImage(f"cannot be read: {OUT_OF_MEMORY} for {int(entry['size']):,} bytes") from None
        return data

    def open(self, key: str) -> BinaryIO:
        """Open a file; only what is read of it is decompressed.

        Raises:
            BadImage: It is missing, empty, encrypted, or damaged.
        """
        entry = self._require(key)
        try:
            return io.BufferedReader(EntryFile(self.read_at, int(entry["size"]), *self._data(entry)), 1 << 14)
        except (OSError, struct.error) as error:
            raise BadImage(f"cannot be read from the archive: {error}") from None

    def read_at(self, offset: int, count: int) -> bytes:
        """Read bytes of the archive; safe in forked processes.

        Raises:
            OSError: The archive ends before.
        """
        if self._owner != os.getpid():  # a file descriptor for each process
            self._descriptor, self._owner = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), os.getpid()
        data = os.pread(self._descriptor, count, offset)
        if len(data) < count:
            raise OSError("the archive is truncated")
        return data

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the open file."""
        return {**self.__dict__, "_descriptor": -1, "_owner": 0}

    def _entries(self) -> Iterator[Entry]:
        raise NotImplementedError

    def _read(self, entry: Any) -> bytes:
        raise NotImplementedError

    def _data(self, entry: Any) -> tuple[int, int, bool]:
        # Offset and length of the stored bytes, and whether they are deflated.
        raise NotImplementedError

    def _entries_by_hash(self) -> np.ndarray:
        if self._index is not None:
            return self._index
        exact, others, folders = [], [], set()
        for entry in self._entries():
            name = _clean(entry.name)
            place = (entry.offset, entry.stored, entry.size, entry.crc, entry.kind)
            exact.append((*_hash(name), *place))
            folders.add(name.rpartition("/")[0])
            for other in dict.fromkeys((*map(_clean, entry.other_names), _normalized(name))):
                if other != name:
                    others.append((*_hash(other), *place))
                    folders.add(other.rpartition("/")[0])
        # Of equal names the last one counts (the sort is stable), and an exact name comes after all others.
        index = np.array(others + exact, _ENTRY)
        if (index["kind"] == Kind.FOLDER).all():
            raise UserError(f"--image_folder {self.path} contains no files")
        self._index = index = index[np.lexsort((index["low"], index["high"]))]
        self._hashes = np.ascontiguousarray(index["high"])
        self._folders = sorted({parent for folder in folders for parent in _parents(folder)})
        return index

    def _require(self, key: str) -> Any:
        found = self._find(key)
        if found is None:
            reason = f"; {self._problem}" if self._problem else ""
            raise BadImage(f"cannot be read: No such file in the archive{reason}")
        kind = int(found["kind"])
        if kind not in (Kind.STORED, Kind.DEFLATED):
            raise BadImage(UNREADABLE[Kind(kind)])
        if not found["size"]:
            raise BadImage("the file is empty")
        return found

    def _find(self, key: str) -> Any | None:
        self._entries_by_hash()
        if self._prefix is None:
            self._prefix = self._find_prefix(self._sample or [key])
        return self._lookup(self._prefix + key)

    def _similar_names(self, absent: list[str]) -> dict[str, str]:
        # The index holds no names, so the archive's own index is read again.
        wanted = {fold_name((self._prefix or "") + key): key for key in absent}
        similar = {}
        for entry in self._entries():
            key = wanted.get(fold_name(_clean(entry.name)))
            if key is not None and entry.kind != Kind.FOLDER:
                similar[key] = f"; {entry.name!r} differs only in upper and lower case"
        return similar

    def _find_prefix(self, keys: list[str]) -> str:
        # The folder below which most of the keys are; "" if no other folder has more of them.
        exact = sum(self._lookup(key) is not None for key in keys)
        if exact == len(keys):
            return ""
        hits: dict[str, int] = {}
        for key in map(_normalized, keys):
            parent = key.rpartition("/")[0]
            for folder in self._folders:
                # A look at the index is needed only for folders that end like the key's own folder.
                if parent and not f"/{folder}".endswith(f"/{parent}"):
                    continue
                prefix = folder[: len(folder) - len(parent)] if parent else f"{folder}/"
                if prefix not in ("", "/") and self._lookup(prefix + key) is not None:
                    hits[prefix] = hits.get(prefix, 0) + 1
        most = max(hits.values(), default=0)
        if exact >= most:
            return ""
        best = [prefix for prefix, count in hits.items() if count == most]
        if len(best) > 1:
            names = ", ".join(sorted(best)[:3])
            self._problem = f"the archive has files of this name below several folders ({names})"
        return best[0] if len(best) == 1 else ""

    def _lookup(self, key: str) -> Any | None:
        assert self._index is not None
        for name in dict.fromkeys((key, _normalized(key))):
            high, low = _hash(name)
            position = int(np.searchsorted(self._hashes, np.uint64(high), side="right")) - 1
            while position >= 0 and self._hashes[position] == high:
                if self._index["low"][position] == low:
                    return self._index[position]
                position -= 1
        return None


def _spread(keys: list[str]) -> list[str]:
    return keys[:: max(1, len(keys) // _SAMPLE_KEYS)]


def _clean(name: str) -> str:
    # "/data/./images//a.jpg" -> "data/images/a.jpg"
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _parents(folder: str) -> Iterator[str]:
    parts = folder.split("/") if folder else []
    for end in range(1, len(parts) + 1):
        yield "/".join(parts[:end])


def _normalized(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _hash(name: str) -> tuple[int, int]:
    try:
        encoded = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        encoded = name.encode("utf-8", "surrogatepass")
    digest = xxhash.xxh3_128_intdigest(encoded)
    return digest >> 64, digest & (1 << 64) - 1
