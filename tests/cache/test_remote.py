"""Caches at URLs, read from real HTTP and S3 servers on this machine, with injected faults."""

import multiprocessing
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest

from cache.make import flip_bit, make_cache, make_shard, rows
from llava_twophase import FeatureCache
from llava_twophase.cache import remote, repetition, time_limits
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.quarantine import Quarantined, read_quarantine, write_quarantine
from llava_twophase.errors import UserError

FAULTS = ("drop", "unavailable", "truncate", "corrupt", "stall")


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(remote, "OPENING", 1.0)
    monkeypatch.setattr(remote, "READING", 20.0)
    monkeypatch.setattr(repetition, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(time_limits, "FIRST", 0.5)
    monkeypatch.setattr(time_limits, "SHORTEST", 0.5)
    monkeypatch.setattr("llava_twophase.cache.rows._PAUSE", 0.05)


def inject(faults, fraction):
    """Give every kind of fault to this fraction of the requests for shards."""
    for name in FAULTS:
        setattr(faults, name, fraction)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_remote_cache_gives_the_rows_of_the_local_one(web, tmp_path, dtype):
    path, keys, stored = make_cache(tmp_path / "cache", dtype=dtype)
    cache = FeatureCache(f"{web.url}/cache")
    order = np.random.default_rng(0).permutation(len(keys))
    assert list(cache.keys()) == keys
    np.testing.assert_array_equal(cache.read_raw([keys[i] for i in order]), stored[order])
    np.testing.assert_array_equal(cache.read(keys), FeatureCache(path).read(keys))
    np.testing.assert_array_equal(cache.column("source_size"), FeatureCache(path).column("source_size"))
    assert pickle.loads(pickle.dumps(cache)).missing([*keys, "no"]) == ["no"]


def test_rows_are_read_by_ranges(web, tmp_path):
    _, keys, _ = make_cache(tmp_path / "cache", (200, 3), shape=(576, 64))
    cache = FeatureCache(f"{web.url}/cache")
    before, opened = web.faults.sent, web.faults.requests
    cache.read_raw(keys[10:14])
    assert web.faults.sent - before == 4 * 576 * 64 * 2
    assert web.faults.requests - opened == 4


def test_rows_of_a_call_are_requested_together(web, tmp_path, monkeypatch):
    monkeypatch.setattr(time_limits, "FIRST", 10.0)
    monkeypatch.setattr(time_limits, "SHORTEST", 10.0)
    _, keys, _ = make_cache(tmp_path / "cache", (16,), dtype="int8")
    cache = FeatureCache(f"{web.url}/cache")
    web.faults.latency = 1.0  # a busy machine starts all threads before the first answer
    cache.read_raw(keys)
    assert web.faults.most_at_once >= 16


def test_faults_are_repeated_and_never_give_wrong_rows(web, tmp_path):
    _, keys, stored = make_cache(tmp_path / "cache", (8, 8))
    inject(web.faults, 0.15)
    cache = FeatureCache(f"{web.url}/cache")
    for _ in range(3):
        np.testing.assert_array_equal(cache.read_raw(keys), stored)
    assert all(web.faults.injected[name] for name in FAULTS)


def test_s3_gives_the_rows_of_the_local_cache_under_faults(s3, tmp_path):
    path, keys, stored = make_cache(tmp_path / "cache", (8, 8))
    s3.upload(path, "s3://bucket/rows")
    inject(s3.faults, 0.1)
    cache = FeatureCache("s3://bucket/rows")
    for _ in range(3):
        np.testing.assert_array_equal(cache.read_raw(keys), stored)
    assert all(s3.faults.injected[name] for name in FAULTS)


def test_an_outage_ends_in_an_error_after_the_patience(web, tmp_path, monkeypatch):
    _, keys, _ = make_cache(tmp_path / "cache")
    monkeypatch.setattr(remote, "READING", 0.5)
    cache = FeatureCache(f"{web.url}/cache")
    web.status = 503
    with pytest.raises(UserError, match=r"cannot be read \(ClientResponseError: 503"):
        cache.read_raw(keys)


def test_an_outage_that_ends_is_survived(web, tmp_path, caplog):
    _, keys, stored = make_cache(tmp_path / "cache")
    cache = FeatureCache(f"{web.url}/cache")
    web.faults.unavailable = 1.0
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(cache.read_raw, keys)
        time.sleep(0.5)
        web.faults.unavailable = 0.0
        np.testing.assert_array_equal(reading.result(20), stored)
    assert "repeating the request" in caplog.text


def test_close_ends_the_reads_of_other_threads(web, tmp_path):
    _, keys, stored = make_cache(tmp_path / "cache")
    cache = FeatureCache(f"{web.url}/cache")
    web.faults.unavailable = 1.0
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(cache.read_raw, keys)
        assert wait([reading], 0.5).not_done
        started = time.monotonic()
        cache.close()
        with pytest.raises(UserError, match="503"):
            reading.result()
        assert time.monotonic() - started < 5
    web.faults.unavailable = 0.0
    np.testing.assert_array_equal(cache.read_raw(keys), stored)


def test_shards_are_not_requested_again_after_one_that_cannot_be_opened(web, tmp_path, monkeypatch):
    path, keys, stored = make_cache(tmp_path / "cache", (1,) * 40)
    first = path / "shards" / FeatureCache(path).manifest.shards[0].file
    content = first.read_bytes()
    first.unlink()
    monkeypatch.setattr(remote, "OPENING", 60.0)
    for name in ("FIRST", "SHORTEST"):  # a busy machine's slow answers are not what is tested
        monkeypatch.setattr(time_limits, name, 10.0)
    web.faults.unavailable = 1.0
    with pytest.raises(UserError, match="does not exist"):
        FeatureCache(f"{web.url}/cache")
    time.sleep(3.0)  # requests that were on their way end
    before = web.faults.requests
    time.sleep(1.0)
    assert web.faults.requests == before > 0
    web.faults.unavailable = 0.0
    first.write_bytes(content)
    np.testing.assert_array_equal(FeatureCache(f"{web.url}/cache").read_raw(keys), stored)


def test_a_connection_that_stalls_is_abandoned(web, tmp_path):
    _, keys, stored = make_cache(tmp_path / "cache")
    cache = FeatureCache(f"{web.url}/cache")
    web.faults.stall = 1.0
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(cache.read_raw, keys)
        time.sleep(0.2)
        web.faults.stall = 0.0
        np.testing.assert_array_equal(reading.result(10), stored)
    assert web.faults.injected["stall"] > 0


def test_a_changed_object_is_an_error(web, tmp_path):
    path, keys, _ = make_cache(tmp_path / "cache")
    cache = FeatureCache(f"{web.url}/cache")
    make_shard(path / "shards/shard-000000.h5", keys[:5], rows(5, seed=9))
    with pytest.raises(UserError, match=r'shard-000000.h5 changed on the server .*version "\w+", now "\w+"'):
        cache.read_raw(keys)


def test_a_changed_s3_object_is_an_error(s3, tmp_path):
    path, keys, _ = make_cache(tmp_path / "cache")
    s3.upload(path, "s3://bucket/changed")
    cache = FeatureCache("s3://bucket/changed")
    make_shard(path / "shards/shard-000000.h5", keys[:5], rows(5, seed=9))
    s3.upload(path, "s3://bucket/changed")
    with pytest.raises(UserError, match=r'shard-000000.h5 changed on the server .*version "\w+", now "\w+"'):
        cache.read_raw(keys)


def test_a_damaged_row_is_an_error_that_names_its_image(web, tmp_path):
    path, keys, stored = make_cache(tmp_path / "cache")
    flip_bit(path, 0, 2)
    cache = FeatureCache(f"{web.url}/cache")
    np.testing.assert_array_equal(cache.read_raw(keys[:2]), stored[:2])
    with pytest.raises(UserError, match=f"{keys[2]}' do not match their checksum.*verify {web.url}/cache"):
        cache.read_raw(keys)


def test_a_truncated_shard_is_refused_when_the_cache_is_opened(web, tmp_path):
    path, _, _ = make_cache(tmp_path / "cache")
    os.truncate(path / "shards/shard-000001.h5", 20_000)
    with pytest.raises(UserError, match="shard-000001.h5 is truncated or too long: 20000 bytes"):
        FeatureCache(f"{web.url}/cache")


def test_a_missing_shard_is_refused_when_the_cache_is_opened(web, tmp_path):
    path, _, _ = make_cache(tmp_path / "cache")
    (path / "shards/shard-000001.h5").unlink()
    with pytest.raises(UserError, match=r"shard-000001.h5 does not exist"):
        FeatureCache(f"{web.url}/cache")


def test_a_server_without_ranges_is_refused_before_a_shard_is_requested(web, tmp_path):
    make_cache(tmp_path / "cache")
    web.ranges = False
    with pytest.raises(UserError, match="cannot be read by ranges: the server sent .* use a server that"):
        FeatureCache(f"{web.url}/cache")
    assert web.faults.requests == 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/cache", r"cannot be read \(ClientConnectorError: .*check the URL and the network"),
        ("http://nohost.invalid/cache", r"cannot be read \(ClientConnectorDNSError: .*check the URL and the network"),
    ],
)
def test_a_url_that_cannot_be_read_is_one_error(url, message):
    with pytest.raises(UserError, match=message):
        FeatureCache(url)


def test_a_url_without_a_cache_is_one_error(web):
    with pytest.raises(UserError, match=f"{web.url}/cache is not a feature cache: it has no manifest.json"):
        FeatureCache(f"{web.url}/cache/")


def test_missing_credentials_are_one_error(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="credentials are missing or were refused .*AWS_ACCESS_KEY_ID"):
        FeatureCache("s3://bucket/cache")


def test_refused_credentials_are_one_error(web, tmp_path):
    make_cache(tmp_path / "cache")
    web.status = 403
    with pytest.raises(UserError, match="credentials are missing or were refused"):
        FeatureCache(f"{web.url}/cache")


def _read_in_child(cache, keys, queue):
    queue.put(cache.read_raw(keys))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_process_reads_too(web, tmp_path, method):
    _, keys, stored = make_cache(tmp_path / "cache")
    cache = FeatureCache(f"{web.url}/cache")
    np.testing.assert_array_equal(cache.read_raw(keys), stored)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(cache, keys, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), stored)
    child.join(30)
    assert child.exitcode == 0
    np.testing.assert_array_equal(cache.read_raw(keys), stored)


def test_opening_requests_each_shard_once_with_a_head(web, tmp_path):
    make_cache(tmp_path / "cache", (2,) * 5)
    web.faults.latency = 0.1
    started = time.perf_counter()
    FeatureCache(f"{web.url}/cache")
    assert web.faults.requests == 5
    assert time.perf_counter() - started < 1.0


def test_keys_longer_than_the_head_are_read(web, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_HEAD", 4096)
    _, keys, stored = make_cache(tmp_path / "cache")
    np.testing.assert_array_equal(FeatureCache(f"{web.url}/cache").read_raw(keys), stored)


def test_the_seed_of_python_is_untouched(web, tmp_path):
    import random

    _, keys, _ = make_cache(tmp_path / "cache")
    web.faults.drop = 0.3
    random.seed(1)
    FeatureCache(f"{web.url}/cache").read_raw(keys)
    after = random.random()
    random.seed(1)
    assert after == random.random()


def test_quarantine_is_read(web, tmp_path):
    path, _, _ = make_cache(tmp_path / "cache")
    assert read_quarantine(f"{web.url}/cache") == {}
    write_quarantine(path, [Quarantined("a.jpg", "empty")])
    assert list(read_quarantine(f"{web.url}/cache")) == ["a.jpg"]


def test_verify_reads_a_remote_cache(web, tmp_path):
    path, keys, _ = make_cache(tmp_path / "cache", dtype="int8")
    assert verify(f"{web.url}/cache") == []
    flip_bit(path, 1, 1)
    (problem,) = verify(f"{web.url}/cache")
    assert problem.file == "shards/shard-000001.h5"
    assert repr(keys[6]) in problem.what
    (path / "shards/shard-000001.h5").unlink()
    (problem,) = verify(f"{web.url}/cache")
    assert "it does not exist" in problem.what


def test_other_protocols_of_fsspec_are_read(tmp_path):
    path, keys, stored = make_cache(tmp_path / "cache")
    np.testing.assert_array_equal(FeatureCache(f"file://{path}").read_raw(keys), stored)
