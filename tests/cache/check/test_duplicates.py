"""Duplicate keys and duplicate images."""

import numpy as np
import xxhash

from cache.make import SHAPE, fingerprint_of, make_cache, rows, write
from llava_twophase.cache.check.duplicates import (
    ShardKeys,
    describe_duplicate_images,
    duplicate_images,
    duplicate_keys,
)
from llava_twophase.cache.format import SHARDS
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.shard_writer import ShardSpec, ShardWriter, sha256


def shard_keys(file, *names):
    encoded = [name.encode() for name in names]
    return ShardKeys(file, np.array(encoded), np.array([xxhash.xxh3_64_intdigest(name) for name in encoded], np.uint64))


def cache_of(folder, sources):
    """A cache of one shard: image key to (size, SHA-256) of its file."""
    (folder / SHARDS).mkdir(parents=True)
    spec = ShardSpec(SHAPE, "bfloat16", fingerprint_of("bfloat16"), {})
    writer = ShardWriter(folder / SHARDS / "shard-000000.h5", list(sources), spec)
    writer.append(rows(len(sources)), list(sources.values()))
    write(folder, [writer.seal()])
    return FeatureCache(folder)


def test_duplicate_keys_reports_each_repetition_with_its_first_shard():
    shards = [shard_keys("one", "a.jpg", "b.jpg", "a.jpg"), shard_keys("two", "c.jpg", "b.jpg", "a.jpg")]
    found = [(b"a.jpg", "one", "one"), (b"a.jpg", "one", "two"), (b"b.jpg", "one", "two")]
    assert sorted(duplicate_keys(shards), key=lambda item: (item[0], item[2])) == found


def test_duplicate_keys_compares_names_of_equal_hashes():
    names = np.array([b"a.jpg", b"b.jpg"])
    assert list(duplicate_keys([ShardKeys("one", names, np.array([7, 7], np.uint64))])) == []
    assert list(duplicate_keys([])) == []


def test_duplicate_images_groups_keys_by_file_most_frequent_first(tmp_path):
    one, two, three = ((5, sha256(name)) for name in (b"one", b"two", b"three"))
    keys = {"a": one, "b": two, "c": two, "d": three, "e": one, "f": two}
    cache = cache_of(tmp_path / "cache", keys)
    assert [group.tolist() for group in duplicate_images(cache)] == [[1, 2, 5], [0, 4]]
    expected = "5 of 6 keys are duplicates of 2 image files, byte for byte: b (3 keys), a (2 keys)"
    assert describe_duplicate_images(cache) == expected


def test_describe_duplicate_images_without_duplicates_is_none(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    assert describe_duplicate_images(FeatureCache(cache)) is None


def test_duplicate_images_ignores_files_that_were_not_recorded(tmp_path):
    cache = cache_of(tmp_path / "cache", dict.fromkeys(["a", "b", "c"], (0, bytes(32))))
    assert duplicate_images(cache) == []
