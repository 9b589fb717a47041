"""Joined caches: rows by key from every cache, on channels, with every check of a single cache."""

import pickle
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cache.make import FINGERPRINT, flip_bit, make_cache
from llava_twophase import CacheWriter, FeatureCache, JoinedCaches
from llava_twophase.cache.joined import caches_of, open_caches
from llava_twophase.errors import UserError
from llava_twophase.joining import join_features

KEYS = [f"{number}.jpg" for number in range(7)]


def write_cache(path, keys, shape=(9, 32), dtype="float32", seed=0):
    """Write a cache of random features; return its path."""
    random = np.random.default_rng(seed)
    values = {key: random.standard_normal(shape, np.float32) for key in sorted(keys)}
    with CacheWriter(path, shape, dtype, {"tower": seed}, images_per_shard=3) as cache:
        for key in keys:
            cache.add(key, values[key])
    return path


@pytest.fixture
def pair(tmp_path):
    """Two caches of other widths, dtypes, shards and row orders; the second lacks one key and has another."""
    first = write_cache(tmp_path / "a", KEYS, (9, 32), "bfloat16")
    second = write_cache(tmp_path / "b", [*KEYS[:0:-1], "other.jpg"], (9, 5), "float32", seed=1)
    return first, second


def test_joined_caches_read_the_rows_of_all_caches_by_key(pair):
    joined, caches = JoinedCaches(pair), [FeatureCache(path) for path in pair]
    keys = [KEYS[3], KEYS[1], KEYS[6], KEYS[3]]
    assert joined.feature_shape == (9, 37)
    expected = np.concatenate([cache.read(keys) for cache in caches], axis=2)
    np.testing.assert_array_equal(joined.read(keys), expected)
    tensor = joined.read_tensor(keys)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), expected)


def test_joined_caches_find_keys_in_the_unicode_form_of_each_cache(tmp_path):
    names = ("\u00e9/\u00fc.jpg", "a.jpg")
    forms = {form: [unicodedata.normalize(form, name) for name in names] for form in ("NFC", "NFD")}
    paths = [write_cache(tmp_path / form, keys, seed=seed) for seed, (form, keys) in enumerate(forms.items())]
    joined, caches = JoinedCaches(paths), [FeatureCache(path) for path in paths]
    expected = np.concatenate([cache.read(keys) for cache, keys in zip(caches, forms.values(), strict=True)], axis=2)
    for keys in forms.values():
        assert keys[0] in joined and joined.missing(keys) == []
        np.testing.assert_array_equal(joined.read(keys), expected)
        assert joined.rows(keys).tolist() == [[0, 0], [1, 1]]
    assert list(joined.keys()) == forms["NFC"] and len(joined) == 2


@pytest.mark.parametrize("method", ["find", "rows", "missing", "read", "read_tensor"])
def test_joined_caches_refuse_a_single_key_as_one_cache_does(pair, method):
    for cache in (JoinedCaches(pair), FeatureCache(pair[0])):
        with pytest.raises(TypeError, match=r"expected a list of image keys; for a single one give \['1.jpg'\]"):
            getattr(cache, method)("1.jpg")


@pytest.mark.parametrize("dtypes", [("bfloat16", "int8"), ("int4", "float16"), ("float32", "bfloat16")])
def test_joined_rows_decode_to_what_read_tensor_reads(dtypes, tmp_path):
    paths, keys = [], None
    for number, dtype in enumerate(dtypes):
        path, keys, _ = make_cache(tmp_path / str(number), dtype=dtype)
        paths.append(path)
    joined, chosen = JoinedCaches(paths), [keys[6], keys[0], keys[2]]
    rows = torch.empty(3, joined.codec.row_bytes, dtype=torch.uint8)
    joined.read_raw_rows_into(joined.rows(chosen), rows.numpy())
    parts = [FeatureCache(path).read_tensor(chosen) for path in paths]
    assert torch.equal(joined.codec.from_rows(rows), join_features(parts))
    assert torch.equal(joined.read_tensor(chosen), join_features(parts))


def test_joined_rows_begin_at_multiples_of_64_bytes(pair):
    codec = JoinedCaches(pair).codec
    sizes = [part.stop - part.start for part in codec.parts]
    assert sizes == [9 * 32 * 2, 9 * 5 * 4] and all(part.start % 64 == 0 for part in codec.parts)
    assert codec.row_bytes % 64 == 0


def test_joined_caches_have_the_images_that_every_cache_has(pair):
    joined = JoinedCaches(pair)
    assert list(joined.keys()) == KEYS[1:] and len(joined) == 6
    assert KEYS[1] in joined and KEYS[0] not in joined and "other.jpg" not in joined and 3 not in joined
    assert joined.missing([KEYS[0], KEYS[2], "other.jpg", "none.jpg"]) == [KEYS[0], "other.jpg", "none.jpg"]
    assert joined.rows([KEYS[6], KEYS[1]]).tolist() == [[6, 0], [1, 5]]


@pytest.mark.parametrize(("key", "lacking"), [(KEYS[0], 1), ("other.jpg", 0)])
def test_joined_caches_report_the_cache_that_lacks_a_key(pair, key, lacking):
    joined = JoinedCaches(pair)
    for read in (joined.read, joined.read_tensor, joined.rows):
        with pytest.raises(UserError, match=f"image key '{key}' is not in the feature cache {pair[lacking]}$"):
            read([key])


@pytest.mark.parametrize("damaged", [0, 1])
def test_joined_caches_refuse_a_row_with_a_flipped_bit(pair, damaged):
    flip_bit(pair[damaged], 0, 2)
    key = (KEYS[2], KEYS[4])[damaged]
    joined = JoinedCaches(pair)
    buffer = np.empty((1, joined.codec.row_bytes), np.uint8)
    joined.read([KEYS[3 - 2 * damaged]])  # in another shard
    for read in (joined.read, lambda keys: joined.read_raw_rows_into(joined.rows(keys), buffer)):
        with pytest.raises(UserError, match=f"the features of '{key}' do not match.* verify {pair[damaged]}"):
            read([key])


def test_joined_caches_refuse_a_buffer_of_another_shape(pair):
    joined = JoinedCaches(pair)
    for shape, dtype in (((1, joined.codec.row_bytes), np.uint8), ((2, joined.codec.row_bytes // 2), np.uint16)):
        with pytest.raises(ValueError, match="expected uint8"):
            joined.read_raw_rows_into(joined.rows(KEYS[1:3]), np.empty(shape, dtype))
    transposed = np.empty((joined.codec.row_bytes, 2), np.uint8).T
    with pytest.raises(ValueError, match="C-contiguous"):
        joined.read_raw_rows_into(joined.rows(KEYS[1:3]), transposed)


def test_joined_caches_read_after_pickling_and_from_threads(pair):
    joined = pickle.loads(pickle.dumps(JoinedCaches(pair)))
    expected = joined.read(KEYS[1:])
    with ThreadPoolExecutor(4) as pool:
        for position, values in enumerate(pool.map(joined.read, [[key] for key in KEYS[1:]])):
            np.testing.assert_array_equal(values[0], expected[position])
    joined.close()
    np.testing.assert_array_equal(joined.read(KEYS[1:]), expected)


def test_joined_caches_interpolate_only_if_asked(tmp_path):
    paths = [write_cache(tmp_path / "a", KEYS, (16, 4)), write_cache(tmp_path / "b", KEYS, (9, 4), seed=1)]
    with pytest.raises(UserError, match=f"{paths[0]} has 16 tokens per image, {paths[1]} has 9"):
        JoinedCaches(paths)
    joined = JoinedCaches(paths, interpolate=True)
    parts = [FeatureCache(path).read_tensor(KEYS) for path in paths]
    assert joined.feature_shape == (16, 8) and torch.equal(joined.read_tensor(KEYS), join_features(parts))
    rows = torch.empty(len(KEYS), joined.codec.row_bytes, dtype=torch.uint8)
    joined.read_raw_rows_into(joined.rows(KEYS), rows.numpy())
    assert torch.equal(joined.codec.from_rows(rows), join_features(parts))
    assert pickle.loads(pickle.dumps(joined)).fingerprint["interpolate_patch_grid"] is True


def test_joined_fingerprint_has_all_caches_in_order(pair):
    joined, other = JoinedCaches(pair), JoinedCaches(pair[::-1])
    assert joined.fingerprint["joined"] == {"1": {"tower": 0}, "2": {"tower": 1}}
    assert joined.fingerprint != other.fingerprint


def test_open_caches_opens_one_cache_as_itself(pair, tmp_path):
    cache = open_caches(pair[:1])
    assert isinstance(cache, FeatureCache) and caches_of(cache) == (cache,) and cache.fingerprint == {"tower": 0}
    assert [cache.path for cache in caches_of(open_caches(pair))] == list(pair)
    with pytest.raises(UserError, match="expected at least two feature caches to join, 1 given"):
        JoinedCaches(pair[:1])


def test_joined_caches_refuse_an_incomplete_cache(pair, tmp_path):
    path, _, _ = make_cache(tmp_path / "incomplete", complete=False, fingerprint=FINGERPRINT)
    with pytest.raises(UserError, match=f"{path} is incomplete"):
        JoinedCaches([pair[0], path])
