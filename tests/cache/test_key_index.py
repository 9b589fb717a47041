"""KeyIndex: right rows for any hashes, and no Python object per key."""

import numpy as np
import pytest
import xxhash

from llava_twophase.cache import key_index as index_module
from llava_twophase.cache.key_index import KeyIndex, index_arrays
from llava_twophase.errors import UserError


def build(shards, digest=xxhash.xxh3_64_intdigest):
    """An index of lists of keys, as shards store them."""
    names, widths, hashes = bytearray(), [], bytearray()
    for keys in shards:
        encoded = [key.encode() for key in keys]
        width = max(map(len, encoded))
        names += b"".join(key.ljust(width, b"\0") for key in encoded)
        widths.append(width)
        hashes += np.array([digest(key) for key in encoded], np.uint64).tobytes()
    return KeyIndex(index_arrays(names, widths, list(map(len, shards)), hashes))


SHARDS = [[f"{shard}/{'é' * shard}{row}.jpg" for row in range(50 + shard)] for shard in range(5)]
KEYS = [key for keys in SHARDS for key in keys]


# Real hashes; hashes that differ only in their low bits, which the index does not keep; hashes that are all equal.
DIGESTS = [xxhash.xxh3_64_intdigest, lambda name: len(name) << 40 | sum(name) & 15, lambda name: 7]


@pytest.mark.parametrize("digest", DIGESTS, ids=["xxh3", "alike", "equal"])
def test_find_returns_rows_of_known_keys_only(digest, monkeypatch):
    index = build(SHARDS, digest)
    monkeypatch.setattr(index_module.xxhash, "xxh3_64_intdigest", digest)
    assert len(index) == len(KEYS) and list(index.names()) == [key.encode() for key in KEYS]
    np.testing.assert_array_equal(index.find(KEYS), np.arange(len(KEYS)))
    random = np.random.default_rng(0).integers(0, len(KEYS), 500)
    np.testing.assert_array_equal(index.find([KEYS[row] for row in random]), random)
    assert index.find(["", "0/", "0/0.jp", "0/0.jpgg", "0/0.jpg\0", "\udcff", "9/0.jpg"]).tolist() == [-1] * 7
    assert index.find([]).tolist() == []


@pytest.mark.parametrize("digest", DIGESTS, ids=["xxh3", "alike", "equal"])
@pytest.mark.parametrize("places", [(0, 0), (0, 4), (2, 3)])
def test_key_index_refuses_duplicate_keys(digest, places):
    shards = [list(keys) for keys in SHARDS]
    for place in places:
        shards[place].append("same.jpg")
    with pytest.raises(UserError, match=r"image key 'same\.jpg' is listed twice"):
        build(shards, digest)


def test_find_in_an_index_of_one_key():
    index = build([["a.jpg"]])
    assert index.find(["a.jpg", "b.jpg"]).tolist() == [0, -1]


def test_shards_returns_the_shard_of_each_row():
    index = build(SHARDS)
    assert index.starts.tolist() == [0, 50, 101, 153, 206, 260]
    assert index.shards(np.array([0, 49, 50, 259])).tolist() == [0, 0, 1, 4]


def test_key_index_takes_eight_bytes_per_key_besides_names():
    index = build([[f"{row:07d}.jpg" for row in range(shard, shard + 10_000)] for shard in range(0, 100_000, 10_000)])
    arrays = [value.nbytes for value in vars(index).values() if isinstance(value, np.ndarray)]
    assert sum(arrays) < 8.1 * len(index)
    assert len(index._names) == 11 * len(index)
