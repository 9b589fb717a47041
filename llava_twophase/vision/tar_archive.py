"""Image files in an uncompressed tar archive."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from llava_twophase.errors import UserError
from llava_twophase.vision.archive_entry import Entry, Kind
from llava_twophase.vision.archives import ImageArchive

# Links that point to links; more than this is a loop.
_LINK_DEPTH = 8


class ImageTar(ImageArchive):
    """Images in an uncompressed tar archive, or in several that were joined into one file."""

    def missing(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the keys that have no entry, in their order, with a reason for each."""
        absent = super().missing(keys)
        if absent and not self._has_end():
            # Truncated between two files: what can be read is correct.
            return {
                key: f"{reason}; {self.path.name} has no end marker: it is truncated" for key, reason in absent.items()
            }
        return absent

    def _has_end(self) -> bool:
        # Two blocks of zeros; tarfile does not require them.
        size = self.path.stat().st_size
        return size >= 2 * tarfile.BLOCKSIZE and not self.read_at(
            size - 2 * tarfile.BLOCKSIZE, 2 * tarfile.BLOCKSIZE
        ).strip(b"\0")

    def _entries(self) -> Iterator[Entry]:
        links: dict[str, str] = {}
        for member, name in self._members():
            if member.islnk() or member.issym():
                links[name] = _target(member, name)
            else:
                links.pop(name, None)
                yield _entry(member, name)
        if links:
            # Links may point forward, so their targets are read in a second pass.
            wanted = set(links.values()) - links.keys()
            files = {name: _entry(member, name) for member, name in self._members() if name in wanted}
            for name, target in links.items():
                yield replace(_follow(target, files, links), name=name)

    def _members(self) -> Iterator[tuple[tarfile.TarInfo, str]]:
        try:
            # ignore_zeros: an archive may follow the end of another one, and a damaged header costs one file.
            with tarfile.open(self.path, "r:", encoding="utf-8", ignore_zeros=True) as archive:
                for member in archive:
                    yield member, posixpath.normpath(member.name).lstrip("/")
                    archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep an object for each file
        except tarfile.ReadError as error:
            raise UserError(f"--image_folder {self.path} is a damaged or truncated tar archive: {error}") from None

    def _read(self, entry: Any) -> bytes:
        return self.read_at(int(entry["offset"]), int(entry["size"]))

    def _data(self, entry: Any) -> tuple[int, int, bool]:
        return int(entry["offset"]), int(entry["size"]), False


def _entry(member: tarfile.TarInfo, name: str) -> Entry:
    if member.issparse():
        return Entry(name, size=member.size, kind=Kind.SPARSE)
    if not member.isreg():
        return Entry(name, kind=Kind.FOLDER if member.isdir() else Kind.SPECIAL)
    return Entry(name, offset=member.offset_data, stored=member.size, size=member.size)


def _target(member: tarfile.TarInfo, name: str) -> str:
    # A hard link names another member, a symbolic link a path relative to its own folder.
    start = posixpath.dirname(name) if member.issym() and not member.linkname.startswith("/") else ""
    return posixpath.normpath(posixpath.join(start, member.linkname)).lstrip("/")


def _follow(target: str, files: dict[str, Entry], links: dict[str, str]) -> Entry:
    for _ in range(_LINK_DEPTH):
        if target in files:
            return files[target]
        target = links.get(target, "")
    return Entry(target, kind=Kind.BROKEN_LINK)
