"""A remote cache with copies on this machine: which rows come from where, and what happens if a copy is wrong."""

import errno
import pickle
import subprocess
import time

import numpy as np
import pytest

from cache.make import make_cache
from cache.slow_link import SlowLink
from llava_twophase import FeatureCache
from llava_twophase.cache import remote, repetition, staged, staging, time_limits
from llava_twophase.cache.staging import Stage
from llava_twophase.errors import UserError


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote, "OPENING", 1.0)
    monkeypatch.setattr(remote, "READING", 20.0)
    monkeypatch.setattr(repetition, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(time_limits, "FIRST", 0.5)
    monkeypatch.setattr(time_limits, "SHORTEST", 0.5)
    monkeypatch.setattr(staged, "_PAUSE", 0.05)
    monkeypatch.setattr(staged, "_FULL_PAUSE", 0.2)
    monkeypatch.setattr("llava_twophase.cache.rows._PAUSE", 0.05)


@pytest.fixture
def opened(web, tmp_path):
    """Return a function that opens the remote cache with room for some copies; and its keys and rows."""
    path, keys, stored = make_cache(tmp_path / "cache", (4, 4, 4))
    size = max(file.stat().st_size for file in (path / "shards").iterdir())

    def open_with_room_for(shards):
        return FeatureCache(f"{web.url}/cache", stage=Stage(tmp_path / "stage", shards * size))

    open_with_room_for.keys, open_with_room_for.stored = keys, stored
    return open_with_room_for


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def copies(tmp_path):
    return len(list((tmp_path / "stage").glob("*.h5")))


def test_rows_with_a_copy_are_not_requested(opened, web, tmp_path):
    cache = opened(3)
    np.testing.assert_array_equal(cache.read_raw(opened.keys), opened.stored)
    cache.stage_ahead(np.arange(12))
    wait_for(lambda: copies(tmp_path) == 3)
    before = web.faults.requests
    np.testing.assert_array_equal(cache.read_raw(opened.keys), opened.stored)
    assert web.faults.requests == before


def test_copies_are_used_by_the_next_process(opened, web, tmp_path):
    opened(3).stage_ahead(np.arange(12))
    wait_for(lambda: copies(tmp_path) == 3)
    cache = pickle.loads(pickle.dumps(opened(3)))
    before = web.faults.requests
    np.testing.assert_array_equal(cache.read_raw(opened.keys), opened.stored)
    assert web.faults.requests == before


def test_shards_are_copied_ahead_of_use_and_removed_after_it(opened, web, tmp_path):
    """The rows are used shard by shard, and there is room for one copy."""
    cache = opened(1)
    present = [
        lambda entry=entry: (tmp_path / f"stage/{entry.xxh3_128}.h5").exists() for entry in cache.manifest.shards
    ]
    cache.stage_ahead(np.arange(12))
    wait_for(present[0])
    time.sleep(0.3)
    assert [found() for found in present] == [True, False, False]
    cache.advance(4)
    wait_for(present[1])
    assert not present[0]()
    cache.advance(4)
    wait_for(present[2])
    cache.stage_ahead(np.arange(12))  # the next epoch
    wait_for(present[0])
    cache.close()
    wait_for(lambda: cache.storage._copier is None)
    np.testing.assert_array_equal(cache.read_raw(opened.keys), opened.stored)


def test_shards_are_copied_in_the_order_of_first_use(opened, tmp_path):
    cache = opened(1)
    cache.stage_ahead(np.array([9, 0, 5]))
    wait_for(lambda: copies(tmp_path) == 1)
    assert (tmp_path / f"stage/{cache.manifest.shards[2].xxh3_128}.h5").exists()


def test_a_damaged_copy_is_removed_and_its_rows_are_requested(opened, web, tmp_path):
    cache = opened(3)
    cache.stage_ahead(np.arange(12))
    wait_for(lambda: copies(tmp_path) == 3)
    for copy in (tmp_path / "stage").glob("*.h5"):
        data = bytearray(copy.read_bytes())
        for header in cache.headers:
            part = header.datasets["features"]
            data[part.offset : part.offset + part.nbytes] = bytes(part.nbytes)
        copy.write_bytes(data)
    np.testing.assert_array_equal(cache.read_raw(opened.keys), opened.stored)


def test_a_truncated_copy_is_not_read(opened, tmp_path):
    cache = opened(3)
    cache.stage_ahead(np.arange(12))
    wait_for(lambda: copies(tmp_path) == 3)
    for copy in (tmp_path / "stage").glob("*.h5"):
        copy.write_bytes(copy.read_bytes()[:9000])
    np.testing.assert_array_equal(cache.read_raw(opened.keys), opened.stored)


def test_a_full_disk_is_reported_and_rows_are_requested(opened, tmp_path, monkeypatch, caplog):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging.os, "posix_fallocate", full)
    cache = opened(3)
    cache.stage_ahead(np.arange(12))
    wait_for(lambda: "No space left on device" in caplog.text)
    assert "rows are requested until then: free some space or lower --stage_gb" in caplog.text
    time.sleep(0.6)  # three more attempts
    assert caplog.text.count("rows are requested") == 1
    np.testing.assert_array_equal(cache.read_raw(opened.keys), opened.stored)
    monkeypatch.undo()
    wait_for(lambda: copies(tmp_path) == 3)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 kB."""
    folder = tmp_path / "stage"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_really_full_disk_is_reported_and_rows_are_requested(small_disk, opened, caplog):
    (small_disk / "other").write_bytes(bytes(90_000))
    cache = opened(3)
    cache.stage_ahead(np.arange(12))
    wait_for(lambda: "No space left on device" in caplog.text)
    np.testing.assert_array_equal(cache.read_raw(opened.keys), opened.stored)
    assert not list(small_disk.glob("*.h5*"))
    (small_disk / "other").unlink()
    wait_for(lambda: list(small_disk.glob("*.h5")))
    np.testing.assert_array_equal(cache.read_raw(opened.keys), opened.stored)
    cache.close()


def test_faults_of_the_server_end_in_complete_copies(opened, web, tmp_path):
    for name in web.faults.injected:
        setattr(web.faults, name, 0.1)
    cache = opened(3)
    cache.stage_ahead(np.arange(12))
    wait_for(lambda: copies(tmp_path) == 3, 30)
    web.status = 503
    np.testing.assert_array_equal(cache.read_raw(opened.keys), opened.stored)


def test_shards_are_copied_over_a_slow_link(opened, web, tmp_path, monkeypatch):
    cache = opened(3)
    size = max(file.stat().st_size for file in (tmp_path / "cache/shards").iterdir())
    link = SlowLink(monkeypatch, rate=size / 15, sharing=1)  # 15 s a shard; the first limits are shorter
    cache.stage_ahead(np.arange(12))
    wait_for(lambda: copies(tmp_path) == 3)
    assert len(link.attempts) == 3 and min(link.attempts.values()) > 1  # each needed longer limits than the first
    web.status = 503
    np.testing.assert_array_equal(cache.read_raw(opened.keys), opened.stored)


def test_copies_that_fail_twice_are_a_warning(opened, web, tmp_path, monkeypatch, caplog):
    cache = opened(3)
    monkeypatch.setattr(remote, "READING", 0.0)
    web.status = 503
    with caplog.at_level("WARNING", "llava_twophase.cache.staged"):
        cache.stage_ahead(np.arange(12))
        wait_for(lambda: "copies failed" in caplog.text)
        assert "2 copies failed, rows are requested until one succeeds: http" in caplog.text
        time.sleep(0.6)
    assert caplog.text.count("copies failed") == 1
    web.status = None
    wait_for(lambda: copies(tmp_path) == 3)


def test_a_limit_below_one_shard_is_refused(opened):
    with pytest.raises(UserError, match=r"--stage_gb .* is too small: a shard of http.* has \d+\.\d+ kB"):
        opened(0.5)


def test_a_local_cache_is_not_staged(tmp_path):
    path, keys, _ = make_cache(tmp_path / "cache")
    cache = FeatureCache(path, stage=Stage(tmp_path / "stage", 1))
    assert not isinstance(cache.storage, staged.StagedStorage)
    cache.stage_ahead(cache.rows(keys))
    cache.advance(1)
    assert not (tmp_path / "stage").exists()
