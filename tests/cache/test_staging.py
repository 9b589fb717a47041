"""Copies of shards on this machine: complete or absent, within their limit, shared, and kept after a kill."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cache.make import flip_bit, make_cache
from helpers import process_environment
from llava_twophase.cache import staging
from llava_twophase.cache.local import LocalStorage, ShardFile
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.cache.shard import Shard
from llava_twophase.cache.staging import Stage
from llava_twophase.errors import UserError


@pytest.fixture
def cache(tmp_path):
    path, _, _ = make_cache(tmp_path / "cache", (3, 3, 3))
    return path


@pytest.fixture
def manifest(cache):
    return read_manifest(cache)


def stage_of(tmp_path, manifest, shards):
    """Return a stage that has room for so many shards."""
    stage = Stage(tmp_path / "stage", shards * max(entry.file_bytes for entry in manifest.shards))
    stage.prepare()
    return stage


def add(stage, cache, manifest, number, kept=()):
    entry = manifest.shards[number]
    return stage.add(LocalStorage(cache).open_shard(entry.file), entry, manifest, lambda: kept)


def files(stage):
    return sorted(path.name for path in stage.folder.iterdir() if path.name != "stage.lock")


def test_a_copy_has_the_bytes_of_the_shard(cache, manifest, tmp_path):
    stage = stage_of(tmp_path, manifest, 3)
    assert stage.open(manifest.shards[0]) is None
    assert add(stage, cache, manifest, 0)
    assert files(stage) == [f"{manifest.shards[0].xxh3_128}.h5"]
    copy = stage.open(manifest.shards[0])
    assert (stage.folder / files(stage)[0]).read_bytes() == (cache / "shards/shard-000000.h5").read_bytes()
    stage.remove(manifest.shards[0])
    assert copy.header().rows == 3  # it can be read until it is closed


def test_the_least_recently_read_copies_are_removed_first(cache, manifest, tmp_path):
    stage = stage_of(tmp_path, manifest, 2)
    assert add(stage, cache, manifest, 0)
    assert add(stage, cache, manifest, 1)
    os.utime(stage.folder / f"{manifest.shards[1].xxh3_128}.h5", (1, 1))
    stage.open(manifest.shards[0])
    assert add(stage, cache, manifest, 2)
    assert [stage.has(entry) for entry in manifest.shards] == [True, False, True]


def test_a_copy_that_is_needed_is_not_removed_for_another(cache, manifest, tmp_path):
    stage = stage_of(tmp_path, manifest, 2)
    kept = {entry.xxh3_128 for entry in manifest.shards[:2]}
    assert add(stage, cache, manifest, 0)
    assert add(stage, cache, manifest, 1)
    assert not add(stage, cache, manifest, 2, kept)
    assert [stage.has(entry) for entry in manifest.shards] == [True, True, False]


@pytest.mark.parametrize("dataset", ["features", "image_key", "row_xxh3", "source_size"])
def test_a_copy_with_a_wrong_bit_is_never_served(cache, manifest, tmp_path, dataset):
    flip_bit(cache, 0, 1, dataset)
    stage = stage_of(tmp_path, manifest, 3)
    with pytest.raises(UserError, match="shard-000000.h5 does not match its checksums after it was copied"):
        add(stage, cache, manifest, 0)
    assert files(stage) == []


def test_another_shard_than_the_manifest_lists_is_never_served(cache, manifest, tmp_path):
    (cache / "shards/shard-000001.h5").replace(cache / "shards/shard-000000.h5")
    with pytest.raises(UserError, match="is not the shard that the manifest lists"):
        add(stage_of(tmp_path, manifest, 3), cache, manifest, 0)


def test_a_copy_that_cannot_be_read_completely_is_removed(cache, manifest, tmp_path):
    class Broken(Shard):
        path, size = "broken", manifest.shards[0].file_bytes

        def read_into(self, view, offset):
            raise UserError("no network")

    stage = stage_of(tmp_path, manifest, 3)
    with pytest.raises(UserError, match="no network"):
        stage.add(Broken(), manifest.shards[0], manifest, set)
    assert files(stage) == []


def test_a_full_disk_leaves_nothing(cache, manifest, tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    stage = stage_of(tmp_path, manifest, 3)
    monkeypatch.setattr(staging.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        add(stage, cache, manifest, 0)
    assert files(stage) == []
    monkeypatch.undo()
    assert add(stage, cache, manifest, 0)


def test_a_file_system_without_fallocate_is_used(cache, manifest, tmp_path, monkeypatch):
    def unsupported(descriptor, offset, size):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(staging.os, "posix_fallocate", unsupported)
    stage = stage_of(tmp_path, manifest, 3)
    assert add(stage, cache, manifest, 0)
    assert stage.open(manifest.shards[0]) is not None


SLOW_COPY = """
import sys, time
from pathlib import Path
from llava_twophase.cache import staging
from llava_twophase.cache.local import LocalStorage
from llava_twophase.cache.manifest import read_manifest

cache, folder = map(Path, sys.argv[1:])
staging._BLOCK = 8192
copy = staging.pwrite_all
def slow(*args):
    copy(*args)
    print("copying", flush=True)
    time.sleep(0.3)
staging.pwrite_all = slow
manifest = read_manifest(cache)
entry = manifest.shards[0]
staging.Stage(folder, 10**9).add(LocalStorage(cache).open_shard(entry.file), entry, manifest, set)
print("done", flush=True)
"""


def start_slow_copy(cache, stage):
    command = [sys.executable, "-c", SLOW_COPY, str(cache), str(stage.folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=process_environment())
    assert process.stdout.readline() == "copying\n"
    return process


def test_processes_share_the_work_and_a_killed_one_leaves_no_copy(cache, manifest, tmp_path):
    stage = stage_of(tmp_path, manifest, 3)
    process = start_slow_copy(cache, stage)
    try:
        assert files(stage) == [f"{manifest.shards[0].xxh3_128}.h5.part"]
        assert stage.open(manifest.shards[0]) is None
        assert not add(stage, cache, manifest, 0)  # the other process copies it
        assert add(stage, cache, manifest, 1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert stage.open(manifest.shards[0]) is None
    assert add(stage, cache, manifest, 2)
    assert files(stage) == sorted(f"{entry.xxh3_128}.h5" for entry in manifest.shards[1:])
    assert add(stage, cache, manifest, 0)
    assert stage.open(manifest.shards[1]) is not None


def test_space_of_a_copy_in_progress_is_counted(cache, manifest, tmp_path):
    stage = stage_of(tmp_path, manifest, 1)
    process = start_slow_copy(cache, stage)
    try:
        assert not add(stage, cache, manifest, 1)
    finally:
        process.kill()
        process.communicate()


def test_threads_copy_each_shard_once(cache, manifest, tmp_path, monkeypatch):
    stage, copied = stage_of(tmp_path, manifest, 3), []
    copy = staging._copy

    def slow_copy(shard, *rest):
        copied.append(shard.path)
        time.sleep(0.05)
        copy(shard, *rest)

    monkeypatch.setattr(staging, "_copy", slow_copy)
    threads = [threading.Thread(target=add, args=(stage, cache, manifest, n % 3)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copied) == len(set(copied)) == 3


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "stage").write_text("")
    with pytest.raises(UserError, match="--stage_dir .*stage"):
        Stage(tmp_path / "stage", 1).prepare()


def test_other_files_of_the_folder_are_kept(cache, manifest, tmp_path):
    stage = stage_of(tmp_path, manifest, 1)
    (stage.folder / "notes.txt").write_text("mine")
    assert add(stage, cache, manifest, 0)
    assert add(stage, cache, manifest, 1)
    assert (stage.folder / "notes.txt").read_text() == "mine"
    assert isinstance(stage.open(manifest.shards[1]), ShardFile)
