"""Files of shards: how many are open, what limits and broken files do, and that threads and links are safe."""

import errno
import hashlib
import json
import os
import threading

import numpy as np
import pytest

from cache.make import SHAPE, STORAGES, make_cache
from helpers import run
from llava_twophase.cache import shard_files
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.format import SHARDS, USER_BLOCK
from llava_twophase.cache.local import LocalStorage, ShardFile
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.shard_files import ShardFiles, check_shard, read_header
from llava_twophase.errors import UserError

SHARD = f"{SHARDS}/shard-000000.h5"

LIMITED = """
import hashlib, os, resource, sys
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.errors import UserError

def limit(files):
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

def open_all():
    files = []
    try:
        while True:
            files.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return files

"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Directory, keys and stored rows of a cache of a hundred shards."""
    return make_cache(tmp_path_factory.mktemp("sharded") / "cache", counts=(1,) * 100)


def limited(code, path):
    """Run code that may lower its limit of open files; return what it printed."""
    return run(["python", "-c", LIMITED + code, path]).stdout.strip()


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_few_files_are_open_for_many_shards(sharded):
    path, keys, stored = sharded
    before = open_descriptors()
    cache = FeatureCache(path)
    for _ in range(2):
        np.testing.assert_array_equal(cache.read_raw(keys), stored)
    assert open_descriptors() - before <= 64
    cache.close()
    assert open_descriptors() == before
    np.testing.assert_array_equal(cache.read_raw(keys[:3]), stored[:3])


def test_kept_files_respect_the_limit_and_leave_room_for_others(sharded):
    code = """
limit(64)
cache = FeatureCache(sys.argv[1])
keys = list(cache.keys())
rows = cache.read_raw(keys)
assert len(os.listdir("/proc/self/fd")) < 32
print(len(rows), hashlib.sha256(rows.tobytes()).hexdigest())
"""
    path, _, stored = sharded
    assert limited(code, path) == f"100 {hashlib.sha256(stored.tobytes()).hexdigest()}"


def test_kept_files_are_given_up_if_the_process_needs_them(sharded):
    code = """
cache = FeatureCache(sys.argv[1])
keys = list(cache.keys())
limit(len(os.listdir("/proc/self/fd")) + 8)
others = open_all()
print(len(cache.read_raw(keys)))
"""
    assert limited(code, sharded[0]) == "100"


def test_limit_without_room_is_one_line_with_the_way_out(sharded):
    code = """
cache = FeatureCache(sys.argv[1])
keys = list(cache.keys())
cache.close()
limit(64)
others = open_all()
try:
    cache.read_raw(keys)
except UserError as error:
    print(error)
"""
    expected = "shard-000000.h5 cannot be read: Too many open files; raise the limit (ulimit -n 1024)"
    assert limited(code, sharded[0]).endswith(expected)


def test_an_unlimited_process_keeps_the_usual_number_of_files(monkeypatch):
    resource = shard_files.resource
    for soft, expected in ((resource.RLIM_INFINITY, 64), (1024, 64), (64, 16), (3, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert shard_files._files_to_keep() == expected


def test_threads_share_a_cache_of_more_shards_than_open_files(sharded):
    path, keys, stored = sharded
    cache, wrong = FeatureCache(path), []

    def read(seed):
        random = np.random.default_rng(seed)
        for _ in range(60):
            picked = random.integers(0, len(keys), 40)
            if not np.array_equal(cache.read_raw([keys[row] for row in picked]), stored[picked]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_error_of_the_disk_is_one_line(tmp_path, monkeypatch):
    path, keys, _ = make_cache(tmp_path / "cache")
    cache = FeatureCache(path)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shard_files.os, "preadv", fail)
    with pytest.raises(UserError, match=r"shard-000000\.h5 cannot be read: Input/output error$"):
        cache.read_raw(keys)
    monkeypatch.setattr(shard_files.os, "pread", fail)
    with pytest.raises(UserError, match=r"shard-000000\.h5 cannot be read: Input/output error$"):
        read_header(path / SHARD)


@pytest.mark.parametrize("kind", ["loop", "link out", "pipe", "folder", "dangling"])
def test_a_shard_that_is_not_a_file_of_the_cache_is_refused(kind, tmp_path):
    path, _, _ = make_cache(tmp_path / "cache")
    shard = (path / SHARD).rename(tmp_path / "shard")
    expected = "cannot be read: it is not a regular file"
    if kind == "pipe":
        os.mkfifo(path / SHARD)
    elif kind == "folder":
        (path / SHARD).mkdir()
    else:
        targets = {"loop": path / SHARD, "link out": shard, "dangling": path / "nothing"}
        (path / SHARD).symlink_to(targets[kind])
        expected = {
            "loop": "Too many levels of symbolic links",
            "link out": "is a link that leads out of the cache; put the file itself there",
            "dangling": "No such file or directory",
        }[kind]
    with pytest.raises(UserError, match=rf"shard-000000\.h5 .*{expected}"):
        FeatureCache(path)


def test_a_git_lfs_pointer_is_reported_by_reader_and_verify(tmp_path):
    path, _, _ = make_cache(tmp_path / "cache")
    (path / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"shard-000000\.h5 is a Git LFS pointer; git lfs pull"):
        FeatureCache(path)
    assert [problem.what for problem in verify(path)] == ["it is a Git LFS pointer; git lfs pull downloads the shard"]


def test_a_damaged_header_is_one_short_line(tmp_path):
    path, _, _ = make_cache(tmp_path / "cache")
    data = (path / SHARD).read_bytes()
    content = {**json.loads(data[:USER_BLOCK]), "fingerprint": ["x\n" * 500]}
    for name, value in (("storage", "x" * 1000), ("format", "x" * 1000), ("schema", "1" * 1000), ("datasets", {})):
        line = json.dumps({**content, name: value}, sort_keys=True).encode()
        (path / SHARD).write_bytes(line.ljust(USER_BLOCK - 1) + b"\n" + data[USER_BLOCK:])
        with pytest.raises(UserError, match=r"shard-000000\.h5 ") as caught:
            FeatureCache(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_link_inside_the_cache_is_read(tmp_path):
    path, keys, stored = make_cache(tmp_path / "cache")
    (path / SHARD).rename(path / "elsewhere.h5")
    (path / SHARD).symlink_to(path / "elsewhere.h5")
    np.testing.assert_array_equal(FeatureCache(path).read_raw(keys), stored)


@pytest.mark.parametrize("dtype", STORAGES)
def test_consecutive_rows_are_read_as_stored(dtype, tmp_path):
    path, keys, _ = make_cache(tmp_path / "cache", counts=(5,), dtype=dtype)
    cache, file = FeatureCache(path), ShardFile(path / SHARD)
    expected = cache.read_raw(keys[1:4]).reshape(3, -1).view(np.uint8)
    rows = np.empty((3, cache.codec.row_bytes), np.uint8)
    file.read_rows_into(file.header(), 1, rows)
    np.testing.assert_array_equal(rows, expected)
    hashes = file.read_dataset(file.header().datasets["source_sha256"])
    np.testing.assert_array_equal(hashes, cache.column("source_sha256"))


def test_check_shard_compares_the_header_with_the_manifest(tmp_path):
    path, _, _ = make_cache(tmp_path / "cache")
    manifest = read_manifest(path)
    assert check_shard(path, manifest.shards[0], manifest.fingerprint).feature_shape == SHAPE
    with pytest.raises(UserError, match="is not the shard that .* lists"):
        check_shard(path, manifest.shards[0].__class__("shard-000000.h5", 5, 7, "0"), manifest.fingerprint)
    with pytest.raises(UserError, match="has another fingerprint"):
        check_shard(path, manifest.shards[0], {"select_layer": -1})


def test_a_forked_process_opens_its_own_files(tmp_path, monkeypatch):
    path, _, _ = make_cache(tmp_path / "cache")
    files = ShardFiles(LocalStorage(path), read_manifest(path).shards)
    first = files.open(0)
    assert files.open(0) is first
    monkeypatch.setattr(shard_files.os, "getpid", lambda: 1)
    assert files.open(0) is not first
