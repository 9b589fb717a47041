"""``Records`` and ``ImageKeys``: sequences over columns, whose items are made when they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from operator import eq
from typing import overload

import numpy as np
import xxhash

from llava_twophase.records.columns import Columns, Selection, digested_text
from llava_twophase.records.record import Record

_CHUNK = 1 << 14  # records that are decoded together


class Records(Sequence[Record]):
    """Records of a data file: all of them, or a selection. A record is made when it is asked for.

    Args:
        selection: Which records.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection

    @classmethod
    def all_of(cls, columns: Columns) -> Records:
        """Return all records of a data file."""
        return cls(Selection(columns, None, {}))

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._selection)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Records: ...

    def __getitem__(self, index: int | slice) -> Record | Records:
        """Return one record, or those of a slice."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self), dtype=np.int64)[index])
        position = range(len(self))[index]
        return next(self._read(position, position + 1))

    def __iter__(self) -> Iterator[Record]:
        """Iterate over the records."""
        return chain.from_iterable(self._read(start, start + _CHUNK) for start in range(0, len(self), _CHUNK))

    def __eq__(self, other: object) -> bool:
        """Return whether another sequence has the same records."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def images(self) -> ImageKeys:
        """The image key of each record."""
        return ImageKeys(self._selection)

    @property
    def word_counts(self) -> np.ndarray:
        """The number of words of each record's prompt and caption, uint32 ``[N]``."""
        return self._selection.column("words")

    @property
    def caption_bytes(self) -> np.ndarray:
        """The bytes of each caption in UTF-8, or of its NFKD form if that has more, uint32 ``[N]``."""
        return self._selection.column("caption_bytes")

    def select(self, positions: np.ndarray) -> Records:
        """Return the records at some positions, in their order.

        Args:
            positions: Positions here, int64.
        """
        chosen, own = self._selection, self._selection.positions
        return Records(Selection(chosen.columns, positions if own is None else own[positions], chosen.renamed))

    def rename(self, images: Mapping[int, str]) -> Records:
        """Return the records with other image keys.

        Args:
            images: The keys by position here.
        """
        chosen = self._selection
        renamed = {int(chosen.in_file(position, position + 1)[0]): key for position, key in images.items()}
        return Records(Selection(chosen.columns, chosen.positions, {**chosen.renamed, **renamed}))

    def without(self, images: Collection[str]) -> Records:
        """Return the records of other images.

        Args:
            images: Image keys.
        """
        names = [image.encode("utf-8", "surrogatepass") for image in images]
        wanted = np.fromiter(map(xxhash.xxh3_64_intdigest, names), np.uint64, len(names))
        kept, keys, dropped = np.ones(len(self), bool), self.images, set(images)
        for position in np.flatnonzero(np.isin(self._selection.hashes(), wanted)).tolist():
            kept[position] = keys[position] not in dropped
        return self if kept.all() else self.select(np.flatnonzero(kept))

    def caption_chunks(self) -> Iterator[list[bytes]]:
        """Iterate over the captions in UTF-8, many at a time."""
        return (self._selection.captions(start, start + _CHUNK) for start in range(0, len(self), _CHUNK))

    def digest(self) -> str:
        """Return the SHA-256 of ``digested_text`` of all records, in hexadecimal digits."""
        chosen = self._selection
        if chosen.positions is None and not chosen.renamed:
            return chosen.columns.digest
        digest = hashlib.sha256()
        for start in range(0, len(self), _CHUNK):
            names, captions = chosen.names(start, start + _CHUNK), chosen.captions(start, start + _CHUNK)
            digest.update(digested_text(names, captions))
        return digest.hexdigest()

    def _read(self, start: int, stop: int) -> Iterator[Record]:
        chosen = self._selection
        places, names, captions = chosen.in_file(start, stop), chosen.names(start, stop), chosen.captions(start, stop)
        for place, name, caption in zip(places.tolist(), names, captions, strict=True):
            yield Record(name.decode(), caption.decode(), chosen.columns.prompt(place))


class ImageKeys(Sequence[str]):
    """The image key of each record, made when it is asked for.

    Args:
        selection: Which records.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._selection)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one key, or a list of those of a slice."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return list(map(bytes.decode, self.names(start, max(start, stop))))
            return [self[position] for position in range(start, stop, step)]
        position = range(len(self))[index]
        return self.names(position, position + 1)[0].decode()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys."""
        parts = (self.names(start, start + _CHUNK) for start in range(0, len(self), _CHUNK))
        return map(bytes.decode, chain.from_iterable(parts))

    def names(self, start: int, stop: int) -> list[bytes]:
        """Return the keys from ``start`` to ``stop`` in UTF-8."""
        return self._selection.names(start, stop)

    def identity(self) -> str:
        """Return hexadecimal digits that are equal for the same keys of the same data file, without reading them."""
        chosen = self._selection
        digest = hashlib.sha256(chosen.columns.digest.encode("ascii"))
        if chosen.positions is not None:
            digest.update(np.ascontiguousarray(chosen.positions, "<i8"))
        digest.update(json.dumps(sorted(chosen.renamed.items())).encode("ascii"))
        return digest.hexdigest()

    def not_ascii(self) -> dict[int, str]:
        """Return the keys that are not ASCII, by position."""
        if self._selection.columns.ascii_keys and not self._selection.renamed:
            return {}
        return {position: key for position, key in enumerate(self) if not key.isascii()}
