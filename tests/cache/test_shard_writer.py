"""ShardWriter: a shard is complete or absent, and its bytes depend only on its rows."""

import numpy as np
import pytest
import xxhash

from cache.make import (
    SHAPE,
    STORAGES,
    channels_of,
    fingerprint_of,
    keys_of,
    make_cache,
    make_shard,
    rows,
    sources_of,
)
from llava_twophase.cache.format import USER_BLOCK
from llava_twophase.cache.header import decode_header
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.shard_writer import NotFiniteError, ShardSpec, ShardWriter
from llava_twophase.errors import UserError

KEYS = keys_of(0, 5)


def open_writer(folder, dtype="bfloat16"):
    channels = channels_of(SHAPE[1]) if dtype in ("int8", "int4") else None
    return ShardWriter(folder / "shard-000000.h5", KEYS, ShardSpec(SHAPE, dtype, fingerprint_of(dtype), {}, channels))


@pytest.mark.parametrize("dtype", STORAGES)
def test_equal_rows_give_equal_bytes(dtype, tmp_path):
    entries = [make_shard(tmp_path / name, KEYS, rows(5, dtype), dtype) for name in ("a.h5", "b.h5")]
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert entries[0].xxh3_128 == entries[1].xxh3_128


def test_append_gives_the_same_bytes_for_any_batches(tmp_path):
    for name, step in (("single.h5", 1), ("pairs.h5", 2), ("all.h5", 5)):
        writer = ShardWriter(tmp_path / name, KEYS, ShardSpec(SHAPE, "bfloat16", {}, {}))
        for start in range(0, 5, step):
            writer.append(rows(5)[start : start + step], sources_of(KEYS[start : start + step]))
        writer.seal()
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_seal_renames_the_work_file(tmp_path):
    writer = open_writer(tmp_path)
    writer.append(rows(5), sources_of(KEYS))
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("shard-000000.h5.") and aside.name.endswith(".tmp")
    entry = writer.seal()
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.h5"] == [entry.file]
    assert (entry.rows, entry.file_bytes) == (5, (tmp_path / entry.file).stat().st_size)


def test_renamed_work_file_is_not_a_shard(tmp_path):
    writer = open_writer(tmp_path)
    writer.append(rows(5), sources_of(KEYS))
    (aside,) = tmp_path.iterdir()
    block = aside.read_bytes()[:USER_BLOCK]
    with pytest.raises(UserError, match="not a shard of a feature cache"):
        decode_header(block, "it")
    writer.discard()


def test_seal_refuses_a_shard_with_missing_rows(tmp_path):
    writer = open_writer(tmp_path)
    writer.append(rows(3), sources_of(KEYS[:3]))
    with pytest.raises(ValueError, match="has 3 of 5 rows"):
        writer.seal()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_append_refuses_values_that_are_not_finite_by_key(dtype, bad, tmp_path):
    writer = open_writer(tmp_path, dtype)
    stored = rows(5, dtype)
    if dtype in ("int8", "int4"):
        stored[3, -2:] = np.array([bad], "<f2").view(np.uint8)
    elif dtype == "bfloat16":
        stored[3, 8, 31] = np.array([bad], np.float32).view(np.uint32)[0] >> 16
    else:
        stored[3, 8, 31] = bad
    with pytest.raises(NotFiniteError, match="picture 3") as error:
        writer.append(stored, sources_of(KEYS))
    assert "picture 2" not in str(error.value)
    assert error.value.rows.tolist() == [3]
    writer.discard()


@pytest.mark.parametrize("largest", [True, False])
def test_append_accepts_the_largest_and_smallest_values(largest, tmp_path):
    writer = open_writer(tmp_path)
    writer.append(np.full((5, *SHAPE), 0x7F7F if largest else 0x0001, np.uint16), sources_of(KEYS))
    assert writer.seal().rows == 5


@pytest.mark.parametrize("wrong", [rows(5, "float32"), rows(5)[:, :4], rows(5)[:, :, :16]], ids=["dtype", "L", "D"])
def test_append_asserts_the_size_of_rows(wrong, tmp_path):
    writer = open_writer(tmp_path)
    with pytest.raises(AssertionError):
        writer.append(wrong, sources_of(KEYS))
    writer.discard()


@pytest.mark.parametrize("dtype", STORAGES)
def test_columns_hold_the_checksums_of_keys_and_rows(dtype, tmp_path):
    path, keys, stored = make_cache(tmp_path / "cache", dtype=dtype)
    cache = FeatureCache(path)
    assert cache.column("key_xxh3").tolist() == [xxhash.xxh3_64_intdigest(key.encode()) for key in keys]
    assert cache.column("row_xxh3").tolist() == [xxhash.xxh3_64_intdigest(row.tobytes()) for row in stored]


def test_seal_replaces_an_older_shard_by_a_complete_one(tmp_path):
    make_shard(tmp_path / "shard-000000.h5", KEYS, rows(5))
    before = (tmp_path / "shard-000000.h5").read_bytes()
    writer = open_writer(tmp_path)
    writer.append(rows(5, seed=7), sources_of(KEYS))
    assert (tmp_path / "shard-000000.h5").read_bytes() == before
    writer.seal()
    assert (tmp_path / "shard-000000.h5").read_bytes() != before


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("dropped", [(0,), (2,), (4,), (1, 2, 3)], ids=str)
def test_drop_leaves_the_shard_that_is_written_without_the_key(dtype, dropped, tmp_path):
    kept = [row for row in range(5) if row not in dropped]
    keys, stored = [KEYS[row] for row in kept], rows(5, dtype)
    writer = open_writer(tmp_path, dtype)
    for row, key in enumerate(KEYS):
        if row in dropped:
            writer.drop(key)
        else:
            writer.append(stored[row : row + 1], sources_of([key]))
    entry = writer.seal()
    channels = channels_of(SHAPE[1]) if dtype in ("int8", "int4") else None
    other = ShardWriter(tmp_path / "other.h5", keys, ShardSpec(SHAPE, dtype, fingerprint_of(dtype), {}, channels))
    other.append(stored[kept], sources_of(keys))
    other.seal()
    assert (tmp_path / entry.file).read_bytes() == (tmp_path / "other.h5").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.h5", "shard-000000.h5"]
