"""Rows of many keys are looked up in parts, and once."""

import numpy as np
import pytest

from cache.make import make_cache
from llava_twophase.cache.joined import JoinedCaches
from llava_twophase.cache.reader import FeatureCache
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
