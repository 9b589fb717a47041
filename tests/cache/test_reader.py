"""FeatureCache: right rows in any order, process and thread; caches and keys that are not valid are refused."""

import os
import pickle
import shutil

import numpy as np
import pytest

from cache.make import SHAPE, STORAGES, flip_bit, keys_of, make_cache, make_shard, rows, write
from helpers import run
from llava_twophase import cache as cache_package
from llava_twophase.cache.format import SHARDS
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.errors import UserError


@pytest.fixture
def small(tmp_path):
    """Directory, keys and stored rows of a cache of two shards."""
    return make_cache(tmp_path / "cache")


@pytest.mark.parametrize("dtype", STORAGES)
def test_read_raw_returns_rows_bit_for_bit_in_any_order(dtype, tmp_path):
    path, keys, stored = make_cache(tmp_path / "cache", counts=(5, 1, 3), dtype=dtype)
    cache = FeatureCache(path)
    assert (len(cache), list(cache.keys()), cache.dtype, cache.feature_shape) == (9, keys, dtype, SHAPE)
    random = np.random.default_rng(0)
    for size in (1, 2, 9, 30):
        picked = random.integers(0, 9, size)
        np.testing.assert_array_equal(cache.read_raw([keys[row] for row in picked]), stored[picked])


@pytest.mark.parametrize("dtype", STORAGES)
def test_read_tensor_equals_read(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    path, keys, stored = make_cache(tmp_path / "cache", dtype=dtype)
    cache = FeatureCache(path)
    tensor = cache.read_tensor(keys)
    assert tensor.shape == (8, *SHAPE)
    assert tensor.dtype == (torch.float32 if dtype.startswith("int") else getattr(torch, dtype))
    # int8 and int4 take a multiplication and an addition, which a device may fuse.
    tolerance = 1e-6 if dtype.startswith("int") else 0
    np.testing.assert_allclose(tensor.float().numpy(), cache.read(keys), rtol=tolerance, atol=tolerance)
    if dtype == "bfloat16":
        np.testing.assert_array_equal(tensor.view(torch.uint16).numpy(), stored)


def test_read_raw_into_fills_the_buffer(small):
    path, keys, stored = small
    buffer = np.zeros((2, *SHAPE), np.uint16)
    FeatureCache(path).read_raw_into([keys[6], keys[0]], buffer)
    np.testing.assert_array_equal(buffer, stored[[6, 0]])


@pytest.mark.parametrize(
    "buffer",
    [
        np.zeros((3, *SHAPE), np.uint16),
        np.zeros((1, *SHAPE), np.uint16),
        np.zeros((2, *SHAPE), np.float32),
        np.zeros((2, *SHAPE[::-1]), np.uint16).transpose(0, 2, 1),
        np.zeros((4, *SHAPE), np.uint16)[::2],
    ],
    ids=["too many rows", "too few rows", "another itemsize", "transposed", "strided"],
)
def test_read_raw_into_refuses_a_buffer_that_does_not_fit(buffer, small):
    path, keys, _ = small
    with pytest.raises(ValueError, match="C-contiguous"):
        FeatureCache(path).read_raw_into(keys[:2], buffer)
    assert not buffer.any()


def test_read_raw_without_keys_returns_no_rows(small):
    assert FeatureCache(small[0]).read_raw([]).shape == (0, *SHAPE)


def test_contains_is_true_only_for_exact_keys(small):
    path, keys, _ = small
    cache = FeatureCache(path)
    assert all(key in cache for key in keys)
    assert all(key not in cache for key in ("", "nothing.jpg", keys[0] + "\0", keys[0] + " ", "\ud800", 3, None))


def test_read_raw_reports_an_unknown_key(small):
    path, keys, _ = small
    with pytest.raises(UserError, match=r"image key '00000/none\.jpg' is not in the feature cache"):
        FeatureCache(path).read_raw([keys[0], "00000/none.jpg"])


def test_read_refuses_a_key_that_is_not_in_a_list(small):
    with pytest.raises(
        TypeError, match=r"expected a list of image keys; for a single one give \['00000/picture 0.jpg'\]"
    ):
        FeatureCache(small[0]).read("00000/picture 0.jpg")


def test_read_raw_distinguishes_keys_of_several_lengths_and_shards(tmp_path):
    cache = tmp_path / "cache"
    (cache / SHARDS).mkdir(parents=True)
    first, second = ["a", "aa", "é" * 40], ["aaa", "b"]
    entries = [
        make_shard(cache / SHARDS / "shard-000000.h5", first, rows(3)),
        make_shard(cache / SHARDS / "shard-000007.h5", second, rows(2, seed=1)),
    ]
    write(cache, entries)
    np.testing.assert_array_equal(
        FeatureCache(cache).read_raw(["aaa", "é" * 40]), np.stack([rows(2, seed=1)[0], rows(3)[2]])
    )


CHILD = """
import hashlib, os, sys
from llava_twophase.cache.reader import FeatureCache
cache = FeatureCache(sys.argv[1])
keys = list(cache.keys())
expected = hashlib.sha256(cache.read_raw(keys).tobytes()).hexdigest()
children = []
for turn in range(4):
    child = os.fork()
    if child == 0:
        order = keys[turn:] + keys[:turn]
        cache.read_raw(order)
        os._exit(hashlib.sha256(cache.read_raw(keys).tobytes()).hexdigest() != expected)
    children.append(child)
    assert hashlib.sha256(cache.read_raw(keys).tobytes()).hexdigest() == expected
codes = [os.waitpid(child, 0)[1] for child in children]
assert hashlib.sha256(cache.read_raw(keys).tobytes()).hexdigest() == expected
print(codes)
"""


def test_read_raw_is_right_in_forked_processes(small):
    # A process of its own: pytest's has threads, which fork would not copy.
    assert run(["python", "-c", CHILD, small[0]]).stdout.startswith("[0, 0, 0, 0]")


def test_pickled_cache_reads_in_another_process(small, tmp_path):
    path, keys, stored = small
    cache = FeatureCache(path)
    cache.read_raw(keys)
    (tmp_path / "pickle").write_bytes(pickle.dumps(cache))
    code = (
        "import pickle, sys\n"
        "cache = pickle.load(open(sys.argv[1], 'rb'))\n"
        "sys.stdout.write(cache.read_raw(sys.argv[2:]).tobytes().hex())"
    )
    assert run(["python", "-c", code, tmp_path / "pickle", *keys]).stdout == stored.tobytes().hex()


def test_read_raw_is_right_in_a_spawned_process(small):
    path, keys, stored = small
    code = (
        "import multiprocessing, sys\n"
        "from llava_twophase.cache.reader import FeatureCache\n"
        "if __name__ == '__main__':\n"
        "    cache = FeatureCache(sys.argv[1])\n"
        "    cache.read_raw(sys.argv[2:3])\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(cache.read_raw, (sys.argv[2:],)).tobytes().hex())\n"
    )
    script = path.parent / "spawn.py"
    script.write_text(code, encoding="utf-8")
    assert run(["python", script, path, *keys]).stdout.strip() == stored.tobytes().hex()


def test_cache_opens_on_a_read_only_disk(small):
    path, keys, stored = small
    for file in [*(path / SHARDS).iterdir(), path / "manifest.json"]:
        file.chmod(0o444)
    (path / SHARDS).chmod(0o555)
    path.chmod(0o555)
    try:
        np.testing.assert_array_equal(FeatureCache(path).read_raw(keys), stored)
    finally:
        path.chmod(0o755)
        (path / SHARDS).chmod(0o755)


def test_incomplete_cache_is_refused_without_allow_incomplete(tmp_path):
    path, keys, stored = make_cache(tmp_path / "cache", complete=False)
    with pytest.raises(UserError, match="incomplete.*run the same extraction command again"):
        FeatureCache(path)
    np.testing.assert_array_equal(FeatureCache(path, allow_incomplete=True).read_raw(keys), stored)


def test_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a feature cache: it has no manifest\.json"):
        FeatureCache(tmp_path)


def test_missing_shard_is_reported(small):
    path, _, _ = small
    (path / SHARDS / "shard-000001.h5").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.h5 cannot be read: No such file"):
        FeatureCache(path)


@pytest.mark.parametrize("size", [0, 100, 4096, 40000])
def test_truncated_shard_is_reported(size, small):
    path, _, _ = small
    os.truncate(path / SHARDS / "shard-000001.h5", size)
    with pytest.raises(UserError, match=r"shard-000001\.h5"):
        FeatureCache(path)


def test_shard_truncated_while_open_is_reported(small):
    path, keys, _ = small
    cache = FeatureCache(path)
    os.truncate(path / SHARDS / "shard-000001.h5", 70000)
    with pytest.raises(UserError, match=r"shard-000001\.h5 is truncated"):
        cache.read_raw(keys)


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("method", ["read", "read_raw", "read_tensor"])
def test_reading_a_row_with_a_flipped_bit_is_refused(method, dtype, tmp_path):
    path, keys, _ = make_cache(tmp_path / "cache", dtype=dtype)
    flip_bit(path, 1, 2)
    read = getattr(FeatureCache(path), method)
    assert len(read(keys[:7])) == 7
    message = rf"the features of '{keys[7]}' do not .* shard-000001\.h5 .*; run: llava-inspect-cache verify {path}$"
    with pytest.raises(UserError, match=message):
        read([keys[0], keys[7]])


def test_reading_a_quantised_row_with_a_flipped_scale_is_refused(tmp_path):
    path, keys, _ = make_cache(tmp_path / "cache", dtype="int8")
    flip_bit(path, 0, 4, "scale")
    with pytest.raises(UserError, match="do not match their checksum"):
        FeatureCache(path).read(keys[4:5])


def test_shard_of_another_cache_is_refused(small, tmp_path):
    other, _, _ = make_cache(tmp_path / "other", fingerprint={"select_layer": -1})
    shutil.copy(other / SHARDS / "shard-000001.h5", small[0] / SHARDS)
    with pytest.raises(UserError, match=r"shard-000001\.h5"):
        FeatureCache(small[0])


def test_listed_shard_with_another_fingerprint_is_refused(small):
    path = small[0]
    shard = path / SHARDS / "shard-000001.h5"
    entry = make_shard(shard, keys_of(1, 3), rows(3), fingerprint={"select_layer": -1})
    first = make_shard(path / SHARDS / "shard-000000.h5", keys_of(0, 5), rows(5))
    write(path, [first, entry])
    with pytest.raises(UserError, match=r"shard-000001\.h5 has another fingerprint"):
        FeatureCache(path)


@pytest.mark.parametrize("places", ["one shard", "two shards"])
def test_duplicate_key_is_refused(places, tmp_path):
    cache = tmp_path / "cache"
    (cache / SHARDS).mkdir(parents=True)
    names = [["a.jpg", "b.jpg", "a.jpg"]] if places == "one shard" else [["a.jpg", "b.jpg"], ["c.jpg", "a.jpg"]]
    entries = [
        make_shard(cache / SHARDS / f"shard-{number:06d}.h5", keys, rows(len(keys)))
        for number, keys in enumerate(names)
    ]
    write(cache, entries)
    with pytest.raises(UserError, match=r"image key 'a\.jpg' is listed twice"):
        FeatureCache(cache)


def test_shards_of_different_shapes_are_refused(tmp_path):
    cache = tmp_path / "cache"
    (cache / SHARDS).mkdir(parents=True)
    entries = [
        make_shard(cache / SHARDS / "shard-000000.h5", ["a", "b"], rows(2)),
        make_shard(cache / SHARDS / "shard-000001.h5", ["c", "d"], rows(2, shape=(4, 32)), shape=(4, 32)),
    ]
    write(cache, entries)
    with pytest.raises(UserError, match=r"shard-000001\.h5 has another feature shape"):
        FeatureCache(cache)


def test_cache_package_exports_its_names_on_first_use():
    assert [name for name in cache_package.__all__ if not callable(getattr(cache_package, name))] == []
    assert set(cache_package.__all__) <= set(dir(cache_package))
    code = "import sys, llava_twophase.cache; print({'numpy', 'torch', 'h5py'} & set(sys.modules))"
    assert run(["python", "-c", code]).stdout == "set()\n"
