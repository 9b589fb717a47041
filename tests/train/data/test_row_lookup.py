"""Rows of many keys are looked up in parts, and once."""

import numpy as np
import pytest

from cache.make import flip_bit, make_cache
from llava_twophase.cache.joined import JoinedCaches
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.records import Record, records_of
from llava_twophase.train.data import row_lookup
from llava_twophase.train.data.row_lookup import RowLookup


@pytest.mark.parametrize("joined", [False, True])
def test_row_lookup_equals_find_and_asks_once(tmp_path, monkeypatch, joined):
    monkeypatch.setattr(row_lookup, "_PART", 3)
    path, keys, _ = make_cache(tmp_path / "cache")
    cache = JoinedCaches([path, path]) if joined else FeatureCache(path)
    keys = ["absent.jpg", *keys[::-1], keys[0]]
    expected = cache.find(keys)
    lookup = RowLookup(cache)
    asked = []
    find = type(cache).find
    monkeypatch.setattr(type(cache), "find", lambda self, part: asked.append(len(part)) or find(self, part))
    assert np.array_equal(lookup.find(keys), expected) and np.array_equal(lookup.find(keys), expected)
    assert sum(asked) == len(keys) and max(asked) <= 3
    assert lookup.find([]).shape == expected[:0].shape


def test_row_lookup_of_many_records_is_kept_for_their_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(row_lookup, "_SHARED_FROM", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    path, _, _ = make_cache(tmp_path / "cache")
    folder, shared, _ = make_cache(tmp_path / "other", counts=(4,))
    other = FeatureCache(folder)
    images = records_of(Record(key, "a caption", "<image>") for key in shared).images
    expected = {cache: cache.find(list(images)) for cache in (FeatureCache(path), other)}
    for cache, rows in expected.items():
        assert np.array_equal(RowLookup(cache).find(images), rows)
    assert len(list((tmp_path / "home" / "llava-twophase" / "rows").glob("*.arrays"))) == 2
    monkeypatch.setattr(FeatureCache, "find", None)
    for cache, rows in expected.items():
        assert np.array_equal(RowLookup(cache).find(images), rows)
    with pytest.raises(TypeError):
        RowLookup(other).find(images[:3])


def test_row_lookup_of_a_damaged_shard_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(row_lookup, "_SHARED_FROM", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    path, keys, _ = make_cache(tmp_path / "cache")
    images = records_of(Record(key, "a caption", "<image>") for key in keys).images
    flip_bit(path, 0, 0, "image_key")
    assert RowLookup(FeatureCache(path)).find(images).tolist() == [-1, *range(1, len(keys))]
    flip_bit(path, 0, 0, "image_key")
    assert RowLookup(FeatureCache(path)).find(images).tolist() == list(range(len(keys)))


def test_row_lookup_of_other_unicode_tables_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(row_lookup, "_SHARED_FROM", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    path, keys, _ = make_cache(tmp_path / "cache")
    images = records_of(Record(key, "a caption", "<image>") for key in keys).images
    for version in ("15.0.0", "16.0.0"):
        monkeypatch.setattr(row_lookup.unicodedata, "unidata_version", version)
        RowLookup(FeatureCache(path)).find(images)
    assert len(list((tmp_path / "home" / "llava-twophase" / "rows").glob("*.arrays"))) == 2
