"""Image keys in the Unicode normalisation form that a cache has: macOS decomposes the accents of file names."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

_FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")


class Keys(Protocol):
    """A feature cache, or joined ones."""

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return the keys that are not in the cache."""


def refuse_single_key(keys: Sequence[str]) -> None:
    """Refuse a single image key, which would be taken for a list of letters.

    Raises:
        TypeError: It is a single key.
    """
    if isinstance(keys, str):
        raise TypeError(f"expected a list of image keys; for a single one give [{keys!r}]")


def all_forms(keys: Iterable[str]) -> set[str]:
    """Return keys, and each of them in NFC and NFD."""
    found = set(keys)
    return found.union(unicodedata.normalize(form, key) for key in found if not key.isascii() for form in _FORMS)


def stored_keys(cache: Keys, keys: Sequence[str]) -> list[str]:
    """Return each key as the cache has it, in NFC or NFD; a key that it has in neither form is unchanged.

    Args:
        cache: Where the keys are looked up.
        keys: Image keys; one that the cache has is returned as it is.

    Raises:
        TypeError: A single key is given instead of a list.
    """
    refuse_single_key(keys)
    missing = cache.missing(list({key for key in keys if not key.isascii()}))
    stored: dict[str, str] = {}
    for form in _FORMS:
        others = {key: unicodedata.normalize(form, key) for key in missing}
        absent = set(cache.missing(list(others.values())))
        stored |= {key: other for key, other in others.items() if other not in absent}
    return [stored.get(key, key) for key in keys]
