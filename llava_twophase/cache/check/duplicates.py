"""Duplicate keys, which a cache must not have, and duplicate images: one file under several keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llava_twophase.cache.reader import FeatureCache
from llava_twophase.text import counted

_EXAMPLES = 5


@dataclass(frozen=True)
class ShardKeys:
    """The image keys of one shard.

    Attributes:
        file: The shard's file name.
        names: The keys, bytes ``[rows]``.
        hashes: Their XXH3-64, uint64 ``[rows]``.
    """

    file: str
    names: np.ndarray
    hashes: np.ndarray


def duplicate_keys(shards: Sequence[ShardKeys]) -> Iterator[tuple[bytes, str, str]]:
    """Find keys that occur more than once, within a shard or in several.

    Yields:
        The key, the file of its first occurrence, and the file of a later one.
    """
    if not shards:
        return
    starts = np.cumsum([0, *(len(shard.names) for shard in shards)])
    hashes = np.concatenate([shard.hashes for shard in shards])
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    first: dict[bytes, str] = {}
    for row in np.union1d(order[equal], order[equal + 1]):
        number = int(np.searchsorted(starts, row, side="right")) - 1
        shard = shards[number]
        key = bytes(shard.names[row - starts[number]])
        if key in first:
            yield key, first[key], shard.file
        else:
            first[key] = shard.file


def duplicate_images(cache: FeatureCache) -> list[np.ndarray]:
    """Find images that are in a cache under several keys, by the hash of their files.

    The first eight bytes of the SHA-256 are compared; the probability that two of 558K different images share them is
    1e-8. Images whose file was not recorded (hash 0) are not compared.

    Returns:
        For each such image its rows, int64, the most frequent image first.
    """
    digests = np.ascontiguousarray(cache.column("source_sha256")[:, :8]).view("<u8").ravel()
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))
    counts = np.diff(np.append(starts, len(order)))
    groups = np.flatnonzero((counts > 1) & (ordered[starts] != 0))
    groups = groups[np.argsort(-counts[groups], kind="stable")]
    return [order[starts[group] : starts[group] + counts[group]] for group in groups]


def describe_duplicate_images(cache: FeatureCache) -> str | None:
    """Describe the duplicate images of a cache in one sentence, with examples; return None if there are none."""
    groups = duplicate_images(cache)
    if not groups:
        return None
    examples = {int(rows[0]): len(rows) for rows in groups[:_EXAMPLES]}
    keys = {row: key for row, key in enumerate(cache.keys()) if row in examples}
    listed = ", ".join(f"{keys[row]} ({count} keys)" for row, count in examples.items())
    more = ", ..." if len(groups) > _EXAMPLES else ""
    total = sum(map(len, groups))
    files = counted(len(groups), "image file")
    return f"{total:,} of {counted(len(cache), 'key')} are duplicates of {files}, byte for byte: {listed}{more}"
