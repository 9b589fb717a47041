"""Keys in the Unicode form that a cache has."""

import unicodedata

from cache.make import make_cache
from llava_twophase import FeatureCache
from llava_twophase.cache.key_forms import stored_keys


def test_stored_keys_finds_the_other_form_and_leaves_other_keys_unchanged(tmp_path):
    path, keys, _ = make_cache(tmp_path / "cache")  # the keys are in NFC, and some have accents
    cache, decomposed = FeatureCache(path), [unicodedata.normalize("NFD", key) for key in keys]
    assert decomposed != keys
    assert stored_keys(cache, decomposed) == keys == stored_keys(cache, keys)
    absent = [unicodedata.normalize("NFD", "\u00fc.jpg"), "a.jpg"]
    assert stored_keys(cache, absent) == absent
