"""repair: the manifest is rebuilt from intact shards; other shards are moved aside, and nothing is deleted."""

import json
import shutil

import numpy as np
import pytest

from cache.make import STORAGES, fingerprint_of, keys_of, make_cache, make_shard, rows
from llava_twophase.cache.check.repair import apply_repair, plan_repair
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.format import SHARDS, USER_BLOCK
from llava_twophase.cache.header import decode_header
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.session import CacheSession
from llava_twophase.errors import UserError


def repair(cache, keys=None):
    done = plan_repair(cache, keys)
    if done.changed:
        with CacheSession(cache, read=False) as session:
            apply_repair(session, done)
    return done


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", STORAGES)
def test_repair_rebuilds_a_lost_manifest(dtype, tmp_path):
    cache, keys, stored = make_cache(tmp_path / "cache", dtype=dtype)
    before = read_manifest(cache)
    (cache / "manifest.json").unlink()
    done = repair(cache, keys)
    after = read_manifest(cache)
    assert after == done.manifest and done.lost == {} and done.aside == [] and after.complete
    assert (after.fingerprint, after.shards, after.channels) == (before.fingerprint, before.shards, before.channels)
    assert verify(cache) == []
    np.testing.assert_array_equal(FeatureCache(cache).read_raw(keys), stored)


def test_repair_does_not_change_an_intact_cache(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    before = (cache / "manifest.json").stat().st_mtime_ns
    assert not repair(cache).changed and (cache / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("place", [10, USER_BLOCK + 20, -5])
def test_repair_moves_a_damaged_shard_aside(place, tmp_path):
    cache, keys, stored = make_cache(tmp_path / "cache", counts=(5, 3, 2))
    intact = (cache / SHARDS / "shard-000001.h5").read_bytes()
    flip(cache / SHARDS / "shard-000001.h5", place)
    done = repair(cache)
    assert list(done.lost) == done.aside == ["shard-000001.h5"] and not done.manifest.complete
    aside = (cache / "damaged/shard-000001.h5").read_bytes()
    assert len(aside) == len(intact) and aside != intact
    opened = FeatureCache(cache, allow_incomplete=True)
    assert list(opened.keys()) == keys[:5] + keys[8:]
    np.testing.assert_array_equal(opened.read_raw(keys[8:]), stored[8:])
    # The shard comes back, is damaged again, and the first one is still kept.
    (cache / SHARDS / "shard-000001.h5").write_bytes(intact)
    flip(cache / SHARDS / "shard-000001.h5", place)
    repair(cache)
    assert {path.name for path in (cache / "damaged").iterdir()} == {"shard-000001.h5", "shard-000001.h5.1"}


def test_repair_lists_a_missing_shard(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache", counts=(5, 3, 2))
    (cache / SHARDS / "shard-000001.h5").unlink()
    assert repair(cache).lost == {"shard-000001.h5": "it is missing"}
    (cache / "manifest.json").unlink()
    assert repair(cache).lost == {"shard-000001.h5": "it is missing"}


def test_repair_moves_a_shard_of_another_cache_aside(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    other = {**fingerprint_of("bfloat16"), "select_layer": -3}
    make_shard(cache / SHARDS / "shard-000002.h5", keys_of(7, 4), rows(4), fingerprint=other)
    (cache / "manifest.json").unlink()
    done = repair(cache)
    assert done.aside == ["shard-000002.h5"] and "fingerprint" in done.lost["shard-000002.h5"]
    assert done.manifest.fingerprint == fingerprint_of("bfloat16")


def test_repair_moves_a_shard_with_duplicate_keys_aside(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    shutil.copy(cache / SHARDS / "shard-000000.h5", cache / SHARDS / "shard-000002.h5")
    assert repair(cache).aside == ["shard-000002.h5"]
    assert len(FeatureCache(cache, allow_incomplete=True)) == 8


def test_repair_adds_shards_that_the_manifest_does_not_list(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache", complete=False)
    make_shard(cache / SHARDS / "shard-000002.h5", keys_of(7, 4), rows(4))
    done = repair(cache)
    assert len(done.manifest.shards) == 3 and done.lost == {} and not done.manifest.complete


def test_repair_keeps_what_a_damaged_manifest_states(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache")
    content = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    content["shards"][0]["rows"] = 4
    content["plan"] = {"first_shard": 0, "digest": "x"}
    (cache / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    done = repair(cache)
    assert done.changed and done.manifest.plan == content["plan"] and done.manifest.shards[0].rows == 5
    assert done.manifest.complete and len(FeatureCache(cache)) == len(keys)


def test_repair_replaces_a_fingerprint_that_no_shard_has(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    content = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    content["fingerprint"]["select_layer"] = -1
    (cache / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    assert repair(cache).manifest.fingerprint == fingerprint_of("bfloat16")
    assert verify(cache) == [] or not read_manifest(cache).complete


def test_repair_with_records_decides_whether_the_cache_is_complete(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache", complete=False)
    assert not plan_repair(cache, [*keys, "new.jpg"]).manifest.complete
    line = json.dumps({"key": "new.jpg", "reason": "empty", "source_size": None, "source_sha256": None})
    (cache / "quarantine.jsonl").write_text(f"{line}\n", encoding="utf-8")
    assert plan_repair(cache, [*keys, "new.jpg"]).manifest.complete


def test_plan_repair_refuses_another_schema(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    content = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    (cache / "manifest.json").write_text(json.dumps({**content, "schema": 2}), encoding="utf-8")
    with pytest.raises(UserError, match="schema version 2"):
        plan_repair(cache)


@pytest.mark.parametrize("state", ["no folder", "empty", "all damaged"])
def test_plan_repair_refuses_a_cache_without_intact_shards(state, tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache", counts=(5,))
    if state == "no folder":
        shutil.rmtree(cache / SHARDS)
    elif state == "empty":
        (cache / SHARDS / "shard-000000.h5").unlink()
    else:
        (cache / SHARDS / "shard-000000.h5").write_bytes(b"x" * 9000)
    with pytest.raises(UserError):
        plan_repair(cache)
    assert (cache / "manifest.json").exists() and not (cache / "damaged").exists()


def test_plan_repair_does_not_follow_links(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    outside = shutil.move(cache / SHARDS / "shard-000001.h5", tmp_path / "outside.h5")
    (cache / SHARDS / "shard-000001.h5").symlink_to(outside)
    assert "it is a link" in plan_repair(cache).lost["shard-000001.h5"]


def test_plan_repair_does_not_list_gaps_before_a_huge_number(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    shard = cache / SHARDS / "shard-000001.h5"
    shard.rename(shard.with_name("shard-999999999.h5"))
    (cache / "manifest.json").unlink()
    assert plan_repair(cache).lost == {}
    assert decode_header((cache / SHARDS / "shard-000000.h5").read_bytes()[:USER_BLOCK], "x").rows == 5
