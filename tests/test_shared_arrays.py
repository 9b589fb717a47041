"""Arrays in a memory-mapped file: made once, checked when opened, and never in the way of a run."""

import errno
import logging
import multiprocessing
import os
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from llava_twophase import shared_arrays as module
from llava_twophase.shared_arrays import release_pages, shared_arrays, user_cache

ARRAYS = {"numbers": np.arange(10, dtype="<u8"), "table": np.ones((3, 5), "<f4"), "empty": np.empty(0, "<i8")}


def make():
    return ARRAYS


def never():
    raise AssertionError("it was made again")


def same(arrays):
    """Return whether these are the arrays of `make`."""
    equal = all(np.array_equal(arrays[name], array) for name, array in ARRAYS.items())
    return equal and {name: a.dtype for name, a in arrays.items()} == {name: a.dtype for name, a in ARRAYS.items()}


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def test_shared_arrays_are_made_once_and_mapped_read_only(tmp_path):
    path = tmp_path / "new" / "a.arrays"
    for arrays in (shared_arrays(path, make), shared_arrays(path, never)):
        assert same(arrays) and not any(array.flags.writeable for array in arrays.values())
    assert str(path) in Path("/proc/self/maps").read_text()
    assert files(path.parent) == ["a.arrays"]


@pytest.mark.parametrize("place", [0, 40, 300, 4095, 4096, -1])
def test_shared_arrays_makes_a_changed_file_again(tmp_path, place):
    path = tmp_path / "a.arrays"
    shared_arrays(path, make)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert same(shared_arrays(path, make)) and same(shared_arrays(path, never))


@pytest.mark.parametrize("size", [0, 31, 4096, 4097, -1])
def test_shared_arrays_makes_a_truncated_file_again(tmp_path, size):
    path = tmp_path / "a.arrays"
    shared_arrays(path, make)
    path.write_bytes(path.read_bytes()[:size])
    assert same(shared_arrays(path, make)) and same(shared_arrays(path, never))


def test_opening_a_file_that_is_truncated_at_that_time_does_not_end_the_process(tmp_path, monkeypatch):
    path, mapped = tmp_path / "a.arrays", module.mmap.mmap
    shared_arrays(path, make)

    def truncate(*args, **kwargs):
        pages = mapped(*args, **kwargs)
        os.truncate(path, 0)
        return pages

    monkeypatch.setattr(module.mmap, "mmap", truncate)
    opening = multiprocessing.get_context("fork").Process(target=lambda: os._exit(len(shared_arrays(path, never))))
    opening.start()
    opening.join()
    assert opening.exitcode == len(ARRAYS)


def test_shared_arrays_makes_a_file_again_that_cannot_be_read(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "a.arrays"
    shared_arrays(path, make)
    monkeypatch.setattr(module, "update_digest", fail)
    assert same(shared_arrays(path, make))


def test_shared_arrays_refuses_a_file_of_another_name(tmp_path):
    shared_arrays(tmp_path / "a.arrays", lambda: {"other": np.zeros(3)})
    (tmp_path / "a.arrays").rename(tmp_path / "b.arrays")
    assert same(shared_arrays(tmp_path / "b.arrays", make))


def test_shared_arrays_waits_for_the_process_that_makes_them(tmp_path, caplog):
    # Locks belong to open files, so threads exclude each other as processes do.
    caplog.set_level(logging.INFO)
    started, go_ahead, found = threading.Event(), threading.Event(), []

    def slowly():
        started.set()
        go_ahead.wait(10)
        return ARRAYS

    maker = threading.Thread(target=lambda: shared_arrays(tmp_path / "a.arrays", slowly))
    waiter = threading.Thread(target=lambda: found.append(shared_arrays(tmp_path / "a.arrays", never)))
    maker.start()
    assert started.wait(10)
    waiter.start()
    while "waiting for another process" not in caplog.text:
        time.sleep(0.01)
    assert not found
    go_ahead.set()
    maker.join()
    waiter.join()
    assert same(found[0])


def test_shared_arrays_without_locks_are_made(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    assert same(shared_arrays(tmp_path / "a.arrays", make)) and same(shared_arrays(tmp_path / "a.arrays", never))


def test_shared_arrays_are_made_if_waiting_for_the_lock_fails(tmp_path, monkeypatch):
    def refuse(_, operation):
        raise BlockingIOError if operation & module.fcntl.LOCK_NB else OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    assert same(shared_arrays(tmp_path / "a.arrays", make)) and same(shared_arrays(tmp_path / "a.arrays", never))


def test_making_a_file_removes_leftovers_and_files_that_nobody_opens(tmp_path):
    for name in ("old", "recent", "used"):
        shared_arrays(tmp_path / name, make)
    for name in (".killed.tmp", ".written.tmp"):
        (tmp_path / name).touch()
    for name in ("old", "used", ".killed.tmp"):
        os.utime(tmp_path / name, (0, 0))
    shared_arrays(tmp_path / "used", never)
    shared_arrays(tmp_path / "a.arrays", make)
    assert files(tmp_path) == [".written.tmp", "a.arrays", "recent", "used"]


def test_opening_a_file_again_on_the_same_day_does_not_change_it(tmp_path):
    path, recent = tmp_path / "a.arrays", time.time() - 3600
    shared_arrays(path, make)
    os.utime(path, (recent, recent))
    before = path.stat()
    shared_arrays(path, never)
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ctime_ns == before.st_ctime_ns


def test_file_that_another_process_made_at_the_same_time_is_not_replaced(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    def make_second():
        other = shared_arrays(path, make)
        found.append((path.stat().st_ino, other))
        return make()

    path, found = tmp_path / "a.arrays", []
    monkeypatch.setattr(module.fcntl, "flock", refuse)
    assert same(shared_arrays(path, make_second)) and path.stat().st_ino == found[0][0]


def test_folder_of_shared_arrays_is_private_unless_it_exists(tmp_path):
    shared_arrays(tmp_path / "new" / "a.arrays", make)
    (tmp_path / "shared").mkdir(mode=0o755)
    shared_arrays(tmp_path / "shared" / "a.arrays", make)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "shared")] == [0o700, 0o755]


def test_shared_arrays_in_a_folder_that_cannot_be_written_stay_in_memory(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert same(shared_arrays(tmp_path / "file" / "a.arrays", make))
    assert "cannot be written" in caplog.text and "XDG_CACHE_HOME" in caplog.text


def test_shared_arrays_that_would_nearly_fill_the_disk_stay_in_memory(tmp_path, monkeypatch, caplog):
    large, path = {"large": np.ones(1 << 18)}, tmp_path / "a.arrays"
    monkeypatch.setattr(module, "free_bytes", lambda _: 1 << 28)
    assert shared_arrays(path, lambda: large) is large and files(tmp_path) == []
    assert "268.4 MB are free, and 270.5 MB are needed" in caplog.text
    monkeypatch.setattr(module, "free_bytes", lambda _: (1 << 28) + (1 << 21))
    shared_arrays(path, lambda: large)
    assert files(tmp_path) == ["a.arrays"]


def test_shared_arrays_on_a_full_disk_stay_in_memory(small_disk, monkeypatch, caplog):
    monkeypatch.setattr(module, "free_bytes", lambda _: 1 << 40)  # a quota leaves less
    folder = small_disk("size=1M")
    large = {"large": np.ones(1 << 18)}
    np.testing.assert_array_equal(shared_arrays(folder / "a.arrays", lambda: large)["large"], large["large"])
    assert "No space left on device" in caplog.text and files(folder) == []


def test_an_error_while_arrays_are_made_leaves_no_file(tmp_path):
    with pytest.raises(AssertionError, match="made again"):
        shared_arrays(tmp_path / "a.arrays", never)
    assert files(tmp_path) == []
    assert same(shared_arrays(tmp_path / "a.arrays", make))


def test_user_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache("keys") == tmp_path / "llava-twophase" / "keys"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache("keys") == tmp_path / ".cache" / "llava-twophase" / "keys"


def test_user_cache_without_a_home_is_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(module.Path, "home", fail)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    assert user_cache("keys") == tmp_path / f"llava-twophase-{os.getuid()}" / "keys"


def test_opening_a_file_leaves_its_pages_unmapped(tmp_path):
    """The checksum reads all of them once; they would count as memory of each process."""
    shared_arrays(tmp_path / "a", lambda: {"values": np.zeros(200 << 20, np.uint8)})
    before = resident()
    arrays = shared_arrays(tmp_path / "a", lambda: {})
    assert resident() - before < 100 << 20
    assert arrays["values"].max() == 0


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_release_pages_unmaps_what_was_read(tmp_path):
    arrays = shared_arrays(tmp_path / "a", lambda: {"values": np.ones(200 << 20, np.uint8)})
    assert int(arrays["values"].sum(dtype=np.int64)) == 200 << 20
    before = resident()
    release_pages({**arrays, "in memory": np.arange(3)})
    assert before - resident() > 100 << 20 and arrays["values"][-1] == 1
