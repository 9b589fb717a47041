"""The index of a large cache in a file that processes share, and what keeps it from giving wrong rows."""

from pathlib import Path

import numpy as np
import pytest
import xxhash

from cache.make import flip_bit, keys_of, make_cache, make_shard, replace_manifest, reseal, rows, write
from llava_twophase import FeatureCache
from llava_twophase.cache import opening
from llava_twophase.cache.joined import JoinedCaches
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.cache.writer import CacheWriter
from llava_twophase.errors import UserError
from llava_twophase.shared_arrays import shared_arrays


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Keep the index of every cache; return the folder of the files."""
    monkeypatch.setattr(opening, "SHARED_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "llava-twophase" / "keys"


def files(kept):
    return sorted(path for path in kept.glob("*") if path.name != "lock")


def refuse_keys(monkeypatch):
    """Make it an error to read the keys of shards."""

    def refuse(*_, **__):
        raise AssertionError("keys were read")

    monkeypatch.setattr(opening, "_read_shards", refuse)


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_cache_with_a_kept_index_gives_the_same_rows(tmp_path, kept, monkeypatch, dtype):
    path, keys, stored = make_cache(tmp_path / "cache", (5, 1, 3), dtype)
    first = FeatureCache(path)
    (file,) = files(kept)
    refuse_keys(monkeypatch)
    second = FeatureCache(path)
    assert str(file) in Path("/proc/self/maps").read_text()
    order = np.random.default_rng(0).permutation(len(keys))
    for cache in (first, second):
        assert list(cache.keys()) == keys and len(cache) == 9
        assert cache.find([*keys, "no.jpg"]).tolist() == [*range(9), -1]
        assert keys[3] in cache and cache.missing(["no.jpg", keys[0]]) == ["no.jpg"]
        np.testing.assert_array_equal(cache.read_raw([keys[i] for i in order]), stored[order])
        with pytest.raises(UserError, match=r"'no\.jpg' is not in the feature cache"):
            cache.rows(["no.jpg"])


def test_small_caches_and_unfinished_ones_write_nothing(tmp_path, kept, monkeypatch):
    path, keys, _ = make_cache(tmp_path / "cache")
    FeatureCache(path, manifest=read_manifest(path))
    unfinished, _, _ = make_cache(tmp_path / "unfinished", complete=False)
    FeatureCache(unfinished, allow_incomplete=True)
    with CacheWriter(path, (9, 32), "bfloat16", FeatureCache(unfinished, allow_incomplete=True).fingerprint) as writer:
        assert keys[0] in writer
    monkeypatch.setattr(opening, "SHARED_FROM", len(keys) + 1)
    FeatureCache(path)
    assert not kept.exists()
    monkeypatch.setattr(opening, "SHARED_FROM", len(keys))
    FeatureCache(path)
    assert len(files(kept)) == 1


def test_cache_that_grew_gets_another_index(tmp_path, kept):
    path, keys, _ = make_cache(tmp_path / "cache")
    FeatureCache(path)
    added = make_shard(path / "shards" / "shard-000002.h5", keys_of(2, 4), rows(4))
    write(path, [*read_manifest(path).shards, added])
    assert list(FeatureCache(path).keys()) == keys + keys_of(2, 4)
    assert len(files(kept)) == 2


def test_equal_shards_share_an_index(tmp_path, kept, monkeypatch):
    for name in ("a", "b"):
        make_cache(tmp_path / name)
    FeatureCache(tmp_path / "a")
    refuse_keys(monkeypatch)
    FeatureCache(tmp_path / "b")
    assert len(files(kept)) == 1


def test_index_of_another_cache_never_gives_a_wrong_row(tmp_path, kept):
    path, keys, _ = make_cache(tmp_path / "cache", (5, 3))
    other, _, _ = make_cache(tmp_path / "other", (8,))
    FeatureCache(path)
    (file,) = files(kept)
    with_keys = opening._read_shards(FeatureCache(other)._files, read_manifest(other), with_checksums=True).arrays()
    # The other cache's keys, placed as this cache's: every lookup gives another image's row.
    arrays = {**with_keys, **{name: array for name, array in shared_arrays(file, dict).items() if name == "starts"}}
    arrays["widths"] = np.repeat(with_keys["widths"], 2)
    file.unlink()
    shared_arrays(file, lambda: arrays)
    cache = FeatureCache(path)
    assert cache.find(keys_of(0, 8)).tolist() == list(range(8)) and cache.find(keys[5:]).tolist() == [-1] * 3
    for key in keys_of(0, 8)[5:]:
        with pytest.raises(UserError, match="do not match their checksum"):
            cache.read([key])


def test_damaged_index_is_made_again(tmp_path, kept):
    path, keys, stored = make_cache(tmp_path / "cache")
    FeatureCache(path)
    (file,) = files(kept)
    data = bytearray(file.read_bytes())
    data[4100] ^= 16
    file.write_bytes(data)
    np.testing.assert_array_equal(FeatureCache(path).read_raw(keys), stored)
    assert file.read_bytes() != data


@pytest.mark.parametrize("number", [0, 1])
def test_kept_index_does_not_hide_a_damaged_shard(tmp_path, kept, number):
    path, keys, _ = make_cache(tmp_path / "cache")
    FeatureCache(path)
    flip_bit(path, number, 1)
    with pytest.raises(UserError, match=rf"bytes of shard-00000{number}\.h5 changed"):
        FeatureCache(path).read(keys)
    shard = path / "shards" / f"shard-00000{number}.h5"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        FeatureCache(path)
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        FeatureCache(path)


def test_index_is_not_made_from_damaged_keys(tmp_path, kept):
    path, _, _ = make_cache(tmp_path / "cache")
    flip_bit(path, 1, 1, "image_key")
    with pytest.raises(UserError, match=r"shard-000001\.h5 does not match its checksum"):
        FeatureCache(path)
    assert files(kept) == []


def test_duplicate_keys_are_refused_and_nothing_is_kept(tmp_path, kept):
    path, _, _ = make_cache(tmp_path / "cache", (3, 3))

    def repeat(data, header):
        place, before = header.datasets["image_key"], keys_of(0, 3)[1].encode()
        data[place.offset : place.offset + place.row_bytes] = before.ljust(place.row_bytes, b"\0")
        hashes = header.datasets["key_xxh3"].offset
        data[hashes : hashes + 8] = xxhash.xxh3_64_intdigest(before).to_bytes(8, "little")

    reseal(path, 1, repeat)
    with pytest.raises(UserError, match="is listed twice"):
        FeatureCache(path)
    assert files(kept) == []


def test_cache_is_read_where_no_index_can_be_kept(tmp_path, kept, caplog):
    kept.parent.parent.mkdir()
    kept.parent.touch()
    path, keys, stored = make_cache(tmp_path / "cache")
    np.testing.assert_array_equal(FeatureCache(path).read_raw(keys), stored)
    assert "each process keeps a copy in its own memory" in caplog.text


def test_joined_caches_share_their_indexes(tmp_path, kept, monkeypatch):
    first, keys, _ = make_cache(tmp_path / "first")
    second, _, _ = make_cache(tmp_path / "second", dtype="float16")
    expected = JoinedCaches([first, second]).read(keys)
    assert len(files(kept)) == 2
    refuse_keys(monkeypatch)
    np.testing.assert_array_equal(JoinedCaches([first, second]).read(keys), expected)


def test_remote_cache_with_a_kept_index_requests_headers_only(tmp_path, kept, web):
    _, keys, stored = make_cache(tmp_path / "cache", (200, 200), shape=(1, 32))
    url = f"{web.url}/cache"
    FeatureCache(url)
    before = web.faults.sent
    cache = FeatureCache(url)
    assert web.faults.sent - before < 2 * 4096 + 4096
    np.testing.assert_array_equal(cache.read_raw(keys), stored)
    assert len(files(kept)) == 1


def test_refused_manifest_of_a_kept_index(tmp_path, kept):
    path, _, _ = make_cache(tmp_path / "cache")
    FeatureCache(path)
    manifest = read_manifest(path)
    replace_manifest(path, type(manifest)({"other": 1}, {}, 8, True, shards=manifest.shards))
    with pytest.raises(UserError, match="another fingerprint"):
        FeatureCache(path)
