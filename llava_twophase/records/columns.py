r"""Records as columns of bytes and numbers, in memory or in memory-mapped files.

The column ``text`` has ``image key \0 caption \0`` of each record in UTF-8, one after another. The others say where the
text of a record begins, and hold what would take each process a minute to compute for 12 million records.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llava_twophase.errors import UserError
from llava_twophase.shared_arrays import Arrays, release_pages, shared_arrays

# Little-endian on every machine, because columns are files. N records, P prompts.
DTYPES: dict[str, np.dtype[Any]] = {
    "text": np.dtype("u1"),
    "starts": np.dtype("<u8"),  # [N + 1] where the text of a record begins, and the end of the last one
    "image_bytes": np.dtype("<u4"),  # [N] bytes of the image key
    "hashes": np.dtype("<u8"),  # [N] XXH3-64 of the image key
    "caption_bytes": np.dtype("<u4"),  # [N] bytes of the caption, or of its NFKD form if that has more
    "words": np.dtype("<u4"),  # [N] words of prompt and caption
    "prompts": np.dtype("<u4"),  # [N] number of the prompt
    "prompt_text": np.dtype("u1"),
    "prompt_starts": np.dtype("<u8"),  # [P + 1] where a prompt begins
}
_FEW = 1 << 10  # more records are read once, by a pass over all of them
_SPARSE = 8  # a chunk's text is copied in one piece unless less than this part of it is asked for


def record_text(names: Sequence[bytes], captions: Sequence[bytes]) -> bytes:
    r"""Return ``image key \0 caption \0`` of each record, one after another."""
    return b"".join(b"%b\0%b\0" % pair for pair in zip(names, captions, strict=True))


def digested_text(names: Sequence[bytes], captions: Sequence[bytes], text: bytes | None = None) -> bytes:
    r"""Return what the digest of records hashes: ``record_text`` with each ``\0`` of a caption doubled.

    Without that, a caption with ``\0`` could have the text of two records. An image key is not empty and has no
    ``\0``, so different records have different texts.

    Args:
        names: Image keys in UTF-8.
        captions: Captions in UTF-8.
        text: Their ``record_text`` if it is at hand.
    """
    text = record_text(names, captions) if text is None else text
    if text.count(b"\0") == 2 * len(names):
        return text
    return record_text(names, [caption.replace(b"\0", b"\0\0") for caption in captions])


@dataclass(frozen=True)
class Columns:
    """All records of a data file.

    Attributes:
        arrays: The arrays of ``DTYPES`` by name, read-only.
        digest: SHA-256 of ``digested_text``, in hexadecimal digits.
        ascii_keys: Whether all image keys are ASCII.
        kept: The file that has the arrays; it may be deleted at any time. None if there is none.
    """

    arrays: Mapping[str, np.ndarray]
    digest: str
    ascii_keys: bool
    kept: Path | None = None

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], kept: Path | None = None) -> Columns:
        """Return the columns of arrays that include those of ``Built.arrays``."""
        return cls(arrays, arrays["digest"].tobytes().decode("ascii"), bool(arrays["ascii_keys"][0]), kept)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.arrays["hashes"])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path of the file if it still exists: another process maps it too."""
        if self.kept is not None and self.kept.is_file():
            return _reopen, (self.kept,)
        return Columns, (dict(self.arrays), self.digest, self.ascii_keys)

    def prompt(self, position: int) -> str:
        """Return the human turn of a record."""
        number, starts = int(self.arrays["prompts"][position]), self.arrays["prompt_starts"]
        return self.arrays["prompt_text"][int(starts[number]) : int(starts[number + 1])].tobytes().decode()


def _reopen(kept: Path) -> Columns:
    def fail() -> Arrays:
        raise UserError(f"{kept} was deleted while its records were in use; run the command again")

    return Columns.of(shared_arrays(kept, fail), kept)


@dataclass(frozen=True)
class Selection:
    """Records of a data file, in an order.

    Attributes:
        columns: All records of the file.
        positions: The positions of the records in the file, int64; None for all.
        renamed: Image keys that replace those of the file, by position in the file.
    """

    columns: Columns
    positions: np.ndarray | None
    renamed: Mapping[int, str]

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.columns) if self.positions is None else len(self.positions)

    def column(self, name: str) -> np.ndarray:
        """Return a column ``[N]`` of ``DTYPES``."""
        values = self.columns.arrays[name]
        return values if self.positions is None else values[self.positions]

    def in_file(self, start: int, stop: int) -> np.ndarray:
        """Return the positions in the file of the records from ``start`` to ``stop``, int64."""
        if self.positions is not None:
            return self.positions[start:stop]
        return np.arange(start, min(stop, len(self)), dtype=np.int64)

    def names(self, start: int, stop: int) -> list[bytes]:
        """Return the image keys of the records from ``start`` to ``stop`` in UTF-8."""
        places = self.in_file(start, stop)
        begins = self.columns.arrays["starts"][places].astype(np.int64)
        names = self._pieces(begins, begins + self.columns.arrays["image_bytes"][places])
        if self.renamed:
            for offset, place in enumerate(places.tolist()):
                if place in self.renamed:
                    names[offset] = self.renamed[place].encode()
        return names

    def hashes(self) -> np.ndarray:
        """Return the XXH3-64 of each image key, uint64 ``[N]``."""
        hashes = self.column("hashes")
        if self.renamed:
            hashes, places = hashes.copy(), self.in_file(0, len(self))
            for index in np.flatnonzero(np.isin(places, list(self.renamed))).tolist():
                hashes[index] = xxhash.xxh3_64_intdigest(self.renamed[int(places[index])].encode())
        return hashes

    def captions(self, start: int, stop: int) -> list[bytes]:
        """Return the captions of the records from ``start`` to ``stop`` in UTF-8."""
        places, starts = self.in_file(start, stop), self.columns.arrays["starts"]
        begins = starts[places].astype(np.int64) + self.columns.arrays["image_bytes"][places] + 1
        return self._pieces(begins, starts[places + 1].astype(np.int64) - 1)

    def _pieces(self, begins: np.ndarray, ends: np.ndarray) -> list[bytes]:
        text = self.columns.arrays["text"]
        if len(begins) == 0:
            return []
        low, high = int(begins.min()), int(ends.max())
        if high - low > _SPARSE * int((ends - begins).sum()) + os.sysconf("SC_PAGESIZE"):
            return [text[begin:end].tobytes() for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        part = text[low:high].tobytes()
        if len(begins) > _FEW:
            release_pages(self.columns.arrays)
        return [part[a:b] for a, b in zip((begins - low).tolist(), (ends - low).tolist(), strict=True)]
