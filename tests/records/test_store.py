"""Columns that are kept for the next start: made once, checked at each start, and never required."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import drawn
from llava_twophase import shared_arrays
from llava_twophase.errors import UserError
from llava_twophase.records import load, load_records, store


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, caplog):
    """The folder of kept columns, also for small files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(load, "_KEPT_FROM", 0)
    caplog.set_level(logging.INFO)
    return tmp_path / "home" / "llava-twophase" / "records"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "records.json"
    drawn.write_records([drawn.make_record(str(i), f"{i}.jpg", f"caption ü {i}") for i in range(30)], path)
    return path


@pytest.fixture
def reads(monkeypatch):
    """How often a data file was read entry by entry."""
    found = []
    read = load.read_json_records
    monkeypatch.setattr(load, "read_json_records", lambda *args: found.append(1) or read(*args))
    return found


def kept(cache):
    return [path for path in cache.iterdir() if path.name != "lock" and path.suffix != ".apart"]


def test_second_start_maps_the_columns(cache, data, reads):
    first, second = load_records(data), load_records(data)
    assert first == second and len(second) == 30 and reads == [1]
    (file,) = kept(cache)
    assert second._selection.columns.kept == file
    assert not any(values.flags.writeable for values in second._selection.columns.arrays.values())


def test_columns_belong_to_the_content_not_to_the_path(cache, data, reads, tmp_path):
    load_records(data)
    copy = tmp_path / "copy.json"
    copy.write_bytes(data.read_bytes())
    assert load_records(copy) == load_records(data) and reads == [1]
    before = data.stat()
    data.write_text(data.read_text(encoding="utf-8").replace("caption", "Caption"), encoding="utf-8")
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_records(data)[0].caption == "Caption ü 0" and len(kept(cache)) == 2


@pytest.mark.parametrize(
    "module", ["constants", "json_file", "json_list", "records/builder", "records/columns", "records/record"]
)
def test_columns_of_other_code_are_not_used(data, reads, monkeypatch, module):
    load_records(data)
    read = Path.read_bytes
    changed = Path(store.__file__).parents[1] / f"{module}.py"
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path == changed else b""))
    load_records(data)
    load_records(data)
    assert len(reads) == 2


def test_columns_of_other_unicode_tables_are_not_used(data, reads, monkeypatch):
    load_records(data)
    monkeypatch.setattr(store.unicodedata, "unidata_version", "99")
    load_records(data)
    assert len(reads) == 2


def test_columns_of_another_pyarrow_are_not_used(cache, data, reads, monkeypatch, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(json.loads(data.read_text(encoding="utf-8")))
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "records.parquet")
    for release in ("1.0", "2.0", "2.0"):
        monkeypatch.setattr(store, "version", lambda name, release=release: release)
        assert len(load_records(tmp_path / "records.parquet")) == len(load_records(data)) == 30
    assert len(kept(cache)) == 3 and reads == [1]


def test_small_files_are_not_kept(cache, data, monkeypatch):
    monkeypatch.setattr(load, "_KEPT_FROM", data.stat().st_size + 1)
    assert len(load_records(data)) == 30 and not cache.exists()


@pytest.mark.parametrize("place", [100, 5000, -1])
def test_damaged_columns_are_made_again(cache, data, reads, place):
    expected = list(load_records(data))
    (file,) = kept(cache)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    assert load_records(data) == expected and len(reads) == 2
    assert load_records(data) == expected and len(reads) == 2


def test_bad_records_are_not_kept(cache, data, reads):
    raws = json.loads(data.read_text(encoding="utf-8"))
    del raws[7]["image"]
    data.write_text(json.dumps(raws), encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UserError, match="record 7 .*has no image"):
            load_records(data)
    assert kept(cache) == [] and len(reads) == 2


def test_absolute_image_paths_are_not_kept(cache, data, tmp_path, caplog):
    raws = json.loads(data.read_text(encoding="utf-8"))
    raws[3]["image"] = str(tmp_path / "a" / "3.jpg")
    data.write_text(json.dumps(raws), encoding="utf-8")
    assert load_records(data, image_folder=tmp_path)[3].image == "a/3.jpg"
    assert load_records(data, image_folder=tmp_path / "a")[3].image == "3.jpg"
    assert kept(cache) == [] and "has absolute image paths, so it is read again at each start" in caplog.text


def test_full_disk_leaves_the_records_in_memory(data, monkeypatch, small_disk, caplog):
    folder = small_disk("size=4k")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    assert len(load_records(data)) == 30
    warned = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert len(warned) == 1 and "No space left on device" in warned[0] and "set XDG_CACHE_HOME" in warned[0]
    assert not list(folder.rglob("*.tmp"))


def test_folder_that_cannot_be_made_leaves_the_records_in_memory(data, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load_records(data)) == 30
    assert "Not a directory" in caplog.text and "set XDG_CACHE_HOME" in caplog.text


def test_no_folder_at_all_leaves_the_records_in_memory(cache, data, monkeypatch, caplog):
    def fail(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(store.tempfile, "TemporaryFile", fail)
    assert len(load_records(data)) == 30
    (warned,) = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    places = f"{cache}: Read-only file system; the folder for temporary files: Read-only file system"
    assert warned == f"the records are read into this process's memory: they cannot be built in {places}"


@pytest.mark.parametrize("opened", [2, 3])
def test_error_of_the_data_file_is_not_one_of_the_folder(data, reads, monkeypatch, opened):
    attempts, open_file = [], Path.open

    def fail_later(path, *args, **kwargs):
        attempts.extend([path] if path == data and reads else [])
        if len(attempts) == opened:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail_later)
    with pytest.raises(UserError, match=f"--data_path {data} cannot be read: Input/output error"):
        load_records(data)
    assert reads == [1]


def test_data_file_that_changes_while_it_is_read_is_refused(cache, data, monkeypatch):
    read = load.read_json_records

    def change(path, flag):
        path.write_bytes(path.read_bytes() + b"\n")
        return read(path, flag)

    monkeypatch.setattr(load, "read_json_records", change)
    with pytest.raises(UserError, match=f"{data} changed while it was read; run the command again"):
        load_records(data)
    assert kept(cache) == []


def test_data_file_that_is_removed_while_it_is_read_is_reported(cache, data, monkeypatch):
    def remove(path, flag):
        path.rename(path.with_name("other.json"))
        return iter([drawn.make_record("7", "a.jpg", "a caption")])

    monkeypatch.setattr(load, "read_json_records", remove)
    with pytest.raises(UserError, match=f"{data} cannot be read: No such file or directory"):
        load_records(data)
    assert kept(cache) == []


def test_kept_records_are_pickled_as_the_path_of_their_file(cache, data):
    records = load_records(data)
    content = pickle.dumps(records)
    assert len(content) < 1000 and pickle.loads(content) == records
    kept(cache)[0].unlink()
    with pytest.raises(UserError, match="was deleted while its records were in use"):
        pickle.loads(content)
    assert pickle.loads(pickle.dumps(records)) == records


def _remove_image(raw, _):
    del raw["image"]


def _make_absolute(raw, folder):
    raw["image"] = str(folder / "3.jpg")


@pytest.mark.parametrize("change", [_remove_image, _make_absolute])
def test_columns_that_are_not_kept_are_built_by_waiting_processes_at_the_same_time(data, tmp_path, monkeypatch, change):
    # Locks belong to open files, so threads exclude each other as processes do.
    calls, together, read = itertools.count(), threading.Barrier(2, timeout=10), load.read_json_records

    def meet(*args):
        if next(calls):
            together.wait()
        return read(*args)

    def outcome(_):
        try:
            return len(load_records(data, image_folder=tmp_path))
        except UserError as error:
            return str(error)

    raws = json.loads(data.read_text(encoding="utf-8"))
    change(raws[3], tmp_path)
    data.write_text(json.dumps(raws), encoding="utf-8")
    monkeypatch.setattr(load, "read_json_records", meet)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(outcome, range(3)))
    assert next(calls) == 3 and len(set(found)) == 1


def test_columns_are_kept_once_the_cause_of_an_error_is_gone(cache, data, reads, monkeypatch):
    def fail(*_):
        raise UserError("a package is missing")

    with monkeypatch.context() as patch:
        patch.setattr(load, "read_json_records", fail)
        with pytest.raises(UserError, match="a package is missing"):
            load_records(data)
    for count in (1, 2, 2):
        assert len(load_records(data)) == 30 and len(reads) == count
    assert len(kept(cache)) == 1


def test_records_that_could_not_be_kept_are_pickled_with_their_columns(cache, data, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    load_records(data)
    (file,) = kept(cache)
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(shared_arrays, "replace_file", fail)
    records = load_records(data)
    assert file.is_file() and pickle.loads(pickle.dumps(records)) == records


def _load(path, start, sizes):
    start.wait()
    load._KEPT_FROM, read = 0, load.read_json_records

    def count(*args):
        sizes.put("read")
        time.sleep(0.3)
        return read(*args)

    load.read_json_records = count
    sizes.put(len(load_records(path)))


def test_one_process_of_a_node_makes_the_columns(data):
    context = multiprocessing.get_context("fork")
    start, found = context.Event(), context.Queue()
    processes = [context.Process(target=_load, args=(Path(data), start, found)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert sorted(str(found.get(timeout=5)) for _ in range(4)) == ["30", "30", "30", "read"]
