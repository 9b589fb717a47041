"""Disks that are full, read-only or gone: sealed shards are kept, the message says what to do, and a rerun resumes."""

import re
import shutil
import subprocess
import time

import pytest

from extract.server import files
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.cache.session import CacheSession
from llava_twophase.cache.shard_writer import ShardSpec, ShardWriter
from llava_twophase.errors import UserError
from llava_twophase.files import explain_os_errors


def test_a_disk_that_fills_up_is_explained_and_a_rerun_resumes(server, command, expected_files, small_disk, tmp_path):
    """The space is there at the start, and something else takes it meanwhile: here, a shard's overhead."""
    disk = small_disk("size=300k")
    flags = command(feature_cache=disk / "cache")
    log = server.run(flags, expect=1)
    assert "is full" in log and "free some space, then run the same command again" in log and "Traceback" not in log
    cache = disk / "cache"
    sealed = {name: content for name, content in files(cache).items() if name.endswith(".h5")}
    assert sealed and all(expected_files[name] == content for name, content in sealed.items())
    assert [problem for problem in verify(cache) if not problem.note and "was interrupted" not in problem.what] == []
    subprocess.run(["mount", "-o", "remount,size=3m", disk], check=True)
    log = server.run(flags)
    assert f"{8 * len(sealed)} images cached" in log
    assert files(cache) == expected_files


@pytest.mark.parametrize("kilobytes", [4, 16, 24])
def test_a_disk_too_full_for_an_empty_shard_is_explained(small_disk, kilobytes):
    """HDF5 fails when it lays the file out, or at some sizes only when it closes the file."""
    disk = small_disk(f"size={kilobytes}k")
    spec = ShardSpec((16, 32), "float32", fingerprint={}, provenance={})
    with pytest.raises(UserError, match="is full"), explain_os_errors(disk, "--feature_cache", str):
        ShardWriter(disk / "shard-000000.h5", [f"{number}.png" for number in range(64)], spec)


def test_features_that_do_not_fit_are_refused_with_both_sizes(server, command, small_disk):
    disk = small_disk("size=48k")
    log = server.run(command(feature_cache=disk / "cache"), expect=1)
    assert re.search(r"\d+\.\d+ kB are needed for .* has \d+\.\d+ kB free", log) and "--storage_dtype int8" in log
    assert "they do not fit" in server.run([*command(feature_cache=disk / "cache"), "--plan"], expect=1)


def test_a_read_only_disk_is_refused_unless_the_cache_is_complete(server, command, expected_files, small_disk):
    disk = small_disk("size=4m")
    server.run(command(feature_cache=disk / "done"))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    log = server.run(command(feature_cache=disk / "cache"), expect=1)
    assert "cannot be written" in log and "give another --feature_cache" in log and "Traceback" not in log
    # A complete cache is not written to.
    assert "nothing to do" in server.run(command(feature_cache=disk / "done"))
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert files(disk / "done") == expected_files


def wait_for_shard(run, cache):
    while not list(cache.glob("shards/*.h5")):
        assert run.code is None
        time.sleep(0.005)


def test_a_cache_deleted_during_the_run_is_explained(server, command, expected_files, tmp_path):
    cache = tmp_path / "cache"
    flags = command(batch_size=1, images_per_shard=1)
    run = server.start(flags)
    wait_for_shard(run, cache)
    cache.rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    assert run.wait() == 1
    assert "was deleted or moved during the run" in run.log() and "Traceback" not in run.log()
    server.run(flags)
    assert verify(cache) == []


def test_a_second_extraction_into_one_cache_is_refused(server, command, expected_files, tmp_path):
    cache = tmp_path / "cache"
    with CacheSession(cache):
        log = server.run(command(), expect=1)
        assert "another process is writing" in log
        assert "to encode   29" in server.run([*command(), "--plan"])
    server.run(command())
    assert files(cache) == expected_files


def test_work_files_of_a_killed_run_are_removed(server, command, expected_files, tmp_path):
    shards = tmp_path / "cache" / "shards"
    shards.mkdir(parents=True)
    (shards / "shard-000000.h5.0a1b2c3d.tmp").write_bytes(b"half a shard")
    (tmp_path / "cache" / "manifest.json.tmp").write_bytes(b"{")
    server.run(command())
    assert files(tmp_path / "cache") == expected_files


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": "another"}'])
def test_a_damaged_manifest_is_reported(server, command, expected_files, tmp_path, damage):
    server.run(command())
    (tmp_path / "cache" / "manifest.json").write_bytes(damage)
    log = server.run(command(), expect=1)
    assert "manifest.json" in log and "Traceback" not in log


def test_a_shard_of_another_cache_is_refused(server, command, tmp_path):
    server.run(command(feature_cache=tmp_path / "other", mm_vision_select_layer=-1))
    server.run(command())
    (tmp_path / "cache/shards/shard-000003.h5").unlink()
    shutil.copy(tmp_path / "other/shards/shard-000003.h5", tmp_path / "cache/shards/shard-000003.h5")
    log = server.run(command(), expect=1)
    assert "shard-000003.h5" in log and "Traceback" not in log


def test_a_moved_cache_is_complete(server, command, image_set, expected_files, tmp_path):
    server.run(command())
    (tmp_path / "cache").rename(tmp_path / "moved")
    assert "nothing to do" in server.run(command(feature_cache=tmp_path / "moved"))
    assert read_manifest(tmp_path / "moved").complete
