"""Text for people: safe to print, and numbers with units."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def printable(text: str) -> str:
    """Escape characters that are not printable: image keys and file names may contain control sequences."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def counted(count: int, noun: str) -> str:
    """Return a number with its noun in the right number, such as ``1 shard`` or ``2,528 images``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def agree(count: int, singular: str, plural: str) -> str:
    """Return the form of a verb that agrees with a number of things, such as ``is`` with 1 and ``are`` with 0 or 2."""
    return singular if count == 1 else plural


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return a question with the known word that is closest to a mistyped one; None if no word is similar."""
    closest = get_close_matches(word, list(known), n=1)
    return f"did you mean {closest[0]}?" if closest else None


def format_bytes(count: float, digits: int = 3) -> str:
    """Return a number of bytes with a decimal unit, such as ``1.933 MB``.

    Args:
        count: The number.
        digits: Digits after the decimal point, if the unit is not bytes.
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{digits}f} {unit}"
    return f"{count:.0f} bytes"
