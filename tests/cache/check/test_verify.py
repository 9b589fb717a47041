"""verify: every fault of a cache is reported with its file; hostile files cause neither a crash nor a hang."""

import json
import os
import random
import shutil
from contextlib import suppress

import numpy as np
import pytest

from cache.make import (
    SHAPE,
    STORAGES,
    keys_of,
    make_cache,
    make_shard,
    reseal,
    rows,
    set_number,
    set_row,
    write,
)
from llava_twophase.cache.check import hdf5_process as hdf5
from llava_twophase.cache.check.files import Problem
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.format import SHARDS, USER_BLOCK
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.shard_files import read_header
from llava_twophase.errors import UserError

SHARD = "shards/shard-000000.h5"


@pytest.fixture(scope="module")
def checker():
    """The HDF5 process, started once for all the small caches of this file."""
    with hdf5.Hdf5Checker() as checker:
        yield checker


@pytest.fixture
def cache(tmp_path):
    """The directory of a cache of two shards, five rows and three."""
    return make_cache(tmp_path / "cache")[0]


def only_problem(cache, checker):
    """The one problem of a cache."""
    (problem,) = verify(cache, checker)
    return problem


def flip(path, position, bit):
    """Flip one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.mark.parametrize("dtype", STORAGES)
def test_verify_accepts_an_intact_cache(dtype, tmp_path, checker):
    assert verify(make_cache(tmp_path / "cache", dtype=dtype)[0], checker) == []


def test_verify_checks_every_batch_of_rows(tmp_path, checker):
    cache, keys, _ = make_cache(tmp_path / "cache", counts=(150,))
    assert verify(cache, checker) == []
    start = read_header(cache / SHARD).datasets["features"].offset
    row_bytes = SHAPE[0] * SHAPE[1] * 2
    for row in (0, 63, 64, 128, 149):
        flip(cache / SHARD, start + row * row_bytes, 0)
        assert repr(keys[row]) in only_problem(cache, checker).what
        flip(cache / SHARD, start + row * row_bytes, 0)


@pytest.mark.parametrize("dtype", STORAGES)
def test_verify_finds_one_flipped_bit_anywhere(dtype, tmp_path, checker):
    cache, _, _ = make_cache(tmp_path / "cache", counts=(3,), dtype=dtype)
    path = cache / SHARD
    header, size = read_header(path), path.stat().st_size
    line = len(path.read_bytes()[:USER_BLOCK].rstrip())
    regions = {
        "header": (0, line),
        "header padding": (line, USER_BLOCK),
        "superblock": (USER_BLOCK, USER_BLOCK + 96),
        "all": (USER_BLOCK, size),
        "end": (size - 8, size),
        **{name: (data.offset, data.offset + data.nbytes) for name, data in header.datasets.items()},
    }
    chance, missed = random.Random(0), []
    for name, (start, stop) in regions.items():
        positions = chance.sample(range(start, stop), min(20, stop - start))
        for position in {start, stop - 1, *positions}:
            bit = chance.randrange(8)
            flip(path, position, bit)
            problems = verify(cache, checker)
            flip(path, position, bit)
            if not any(problem.file == SHARD and not problem.note for problem in problems):
                missed.append((name, position, bit))
    assert missed == []
    assert verify(cache, checker) == []


def test_verify_finds_a_flipped_bit_in_the_header(cache, checker):
    missed = []
    for position in range(0, 900, 3):
        flip(cache / SHARD, position, position % 8)
        if not verify(cache, checker):
            missed.append(position)
        flip(cache / SHARD, position, position % 8)
    assert missed == []


def test_verify_reports_the_image_of_a_flipped_bit(cache, checker):
    header = read_header(cache / SHARD)
    flip(cache / SHARD, header.datasets["features"].offset + 3 * SHAPE[0] * SHAPE[1] * 2 + 5, 2)
    problem = only_problem(cache, checker)
    assert (problem.file, problem.what) == (SHARD, "the features of '00000/picture 3.jpg' do not match their checksum")
    assert "extraction command" in problem.fix


@pytest.mark.parametrize("size", [0, 1, USER_BLOCK - 1, USER_BLOCK, 30000, -1])
def test_verify_reports_a_truncated_shard(size, cache, checker):
    os.truncate(cache / SHARD, size if size >= 0 else (cache / SHARD).stat().st_size - 1)
    problem = only_problem(cache, checker)
    assert problem.file == SHARD and problem.what.startswith("it is truncated")


def test_verify_reports_a_shard_that_is_too_long(cache, checker):
    with (cache / SHARD).open("ab") as file:
        file.write(b"\0")
    assert "too long" in only_problem(cache, checker).what


def test_verify_reports_a_missing_shard(cache, checker):
    (cache / SHARD).unlink()
    assert only_problem(cache, checker) == Problem(SHARD, "it is missing", verify(cache, checker)[0].fix)


def test_verify_reports_a_missing_folder_of_shards(cache, checker):
    shutil.rmtree(cache / SHARDS)
    assert "No such file" in only_problem(cache, checker).what


def test_verify_reports_an_unlisted_shard(cache, checker):
    shutil.copy(cache / SHARD, cache / SHARDS / "shard-000009.h5")
    problem = only_problem(cache, checker)
    assert problem.file == "shards/shard-000009.h5" and "extra" in problem.what and not problem.note


def test_verify_notes_a_leftover_work_file(cache, checker):
    (cache / SHARDS / "shard-000002.h5.0a1b2c3d.tmp").write_bytes(b"half")
    problem = only_problem(cache, checker)
    assert problem.note and problem.file == "shards/shard-000002.h5.0a1b2c3d.tmp"


def test_verify_reports_an_incomplete_cache(tmp_path, checker):
    cache, _, _ = make_cache(tmp_path / "cache", complete=False)
    problem = only_problem(cache, checker)
    assert problem.file == "manifest.json" and not problem.note
    # Sealed since the manifest was written: the next run adds it.
    shutil.copy(cache / SHARD, cache / SHARDS / "shard-000009.h5")
    assert [problem.note for problem in verify(cache, checker)] == [False, True]


def test_verify_reports_values_that_are_not_finite(cache, checker):
    stored = rows(5)[2]
    stored[4, 7] = 0x7FC0
    reseal(cache, 0, lambda data, header: set_row(data, header, 2, stored))
    assert only_problem(cache, checker).what == "the features of '00000/éépicture 2.jpg' are not finite"


def test_verify_reports_a_shard_with_another_fingerprint(cache, checker):
    entries = [
        make_shard(cache / SHARDS / "shard-000000.h5", keys_of(0, 5), rows(5)),
        make_shard(cache / SHARDS / "shard-000001.h5", keys_of(1, 3), rows(3), fingerprint={"select_layer": -1}),
    ]
    write(cache, entries)
    problem = only_problem(cache, checker)
    assert problem.file == "shards/shard-000001.h5" and "fingerprint" in problem.what


@pytest.mark.parametrize(("name", "value"), [("rows", 4), ("file_bytes", 1), ("xxh3_128", "0" * 32)])
def test_verify_reports_a_shard_that_differs_from_the_manifest(name, value, cache, checker):
    content = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    content["shards"][1][name] = value
    (cache / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    problem = only_problem(cache, checker)
    assert problem.file == "shards/shard-000001.h5" and name in problem.what and repr(value).strip("'") in problem.what


def test_verify_reports_swapped_shards(cache, checker):
    first, second = (cache / SHARDS / f"shard-00000{number}.h5" for number in (0, 1))
    first.rename(cache / "aside")
    second.rename(first)
    (cache / "aside").rename(second)
    assert {problem.file for problem in verify(cache, checker)} == {SHARD, "shards/shard-000001.h5"}


def test_verify_reports_a_shard_that_is_listed_twice(cache, checker):
    content = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    content["shards"].append(content["shards"][0])
    (cache / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    assert "2 times" in only_problem(cache, checker).what


def test_verify_reports_shards_of_different_shapes(cache, checker):
    entries = [
        make_shard(cache / SHARDS / "shard-000000.h5", keys_of(0, 5), rows(5)),
        make_shard(cache / SHARDS / "shard-000001.h5", keys_of(1, 3), rows(3, shape=(4, 32)), shape=(4, 32)),
    ]
    write(cache, entries)
    assert "first shard" in only_problem(cache, checker).what


def test_verify_reports_a_wrong_key_hash(cache, checker):
    reseal(cache, 0, lambda data, header: set_number(data, header, "key_xxh3", 1, 7))
    assert only_problem(cache, checker).what == "key_xxh3 of '00000/épicture 1.jpg' is not its hash"


@pytest.mark.parametrize(
    "key", ["/etc/passwd", "../secret.jpg", "a/../../b.jpg", "a//b.jpg", "./a.jpg", "..", " ", "a/"]
)
def test_verify_reports_a_key_that_is_not_a_relative_path(key, tmp_path, checker):
    cache = tmp_path / "cache"
    (cache / SHARDS).mkdir(parents=True)
    write(cache, [make_shard(cache / SHARD, ["a.jpg", key], rows(2))])
    assert only_problem(cache, checker).what == f"image key {key!r} is not a relative UTF-8 path"


@pytest.mark.parametrize("name", [b"\xff\xfe.jpg", b"a\0b.jpg", b""])
def test_verify_reports_a_key_that_is_not_text(name, cache, checker):
    def edit(data, header):
        column = header.datasets["image_key"]
        data[column.offset : column.offset + column.row_bytes] = name.ljust(column.row_bytes, b"\0")

    reseal(cache, 0, edit)
    assert any("is not a relative UTF-8 path" in problem.what for problem in verify(cache, checker))


@pytest.mark.parametrize("places", ["one shard", "two shards"])
def test_verify_reports_duplicate_keys(places, tmp_path, checker):
    cache = tmp_path / "cache"
    (cache / SHARDS).mkdir(parents=True)
    names = [["a.jpg", "b.jpg", "a.jpg"]] if places == "one shard" else [["a.jpg", "b.jpg"], ["c.jpg", "a.jpg"]]
    paths = [cache / SHARDS / f"shard-{number:06d}.h5" for number in range(len(names))]
    write(cache, [make_shard(path, keys, rows(len(keys))) for path, keys in zip(paths, names, strict=True)])
    problem = only_problem(cache, checker)
    assert problem.file == f"shards/{paths[-1].name}" and problem.what.startswith("image key 'a.jpg' is listed again")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_verify_reports_channels_that_differ_from_the_fingerprint(dtype, tmp_path, checker):
    cache, _, _ = make_cache(tmp_path / "cache", dtype=dtype)

    def edit(data, header):
        data[header.datasets["channel_std"].offset] ^= 1

    reseal(cache, 1, edit)
    problem = only_problem(cache, checker)
    assert problem.file == "shards/shard-000001.h5" and "channel_std" in problem.what


def test_verify_reports_hdf5_metadata_that_differ_from_the_header(cache, checker):
    # The offset of /features in its object header: other tools would read other bytes than we do.
    def edit(data, header):
        offset = header.datasets["features"].offset - USER_BLOCK
        place = data.index(offset.to_bytes(8, "little"), USER_BLOCK)
        data[place : place + 8] = (offset - 4096).to_bytes(8, "little")

    reseal(cache, 0, edit)
    assert only_problem(cache, checker).what == "the HDF5 metadata of features differ from the header"


def test_verify_reports_hdf5_links(cache, checker):
    def edit(data, header):
        place = data.index(b"row_xxh3\0", USER_BLOCK)
        data[place : place + 8] = b"row_xxh4"

    reseal(cache, 0, edit)
    assert "links" in only_problem(cache, checker).what


def test_verify_reports_a_crash_of_hdf5(cache, monkeypatch):
    monkeypatch.setattr(hdf5, "__name__", "llava_twophase.no_such_module")
    problems = verify(cache)
    assert [problem.what for problem in problems] == ["HDF5 crashes on its metadata"] * 2


def test_verify_reports_a_hang_of_hdf5(cache, monkeypatch):
    monkeypatch.setattr(hdf5, "SECONDS", 0.0)
    assert {problem.what for problem in verify(cache)} == {"HDF5 hangs on its metadata"}


@pytest.mark.parametrize("name", ["manifest.json", SHARD, SHARDS, "quarantine.jsonl"])
def test_verify_reads_nothing_outside_the_cache(name, cache, checker, tmp_path):
    outside = tmp_path / "outside"
    if (cache / name).exists():
        (cache / name).rename(outside)
    else:
        outside.write_text("{}\n", encoding="utf-8")
    (cache / name).symlink_to(outside)
    problem = verify(cache, checker)[0]
    assert problem.file == name and "leads out of the cache" in problem.what


def test_verify_accepts_a_link_to_the_cache(cache, checker, tmp_path):
    (tmp_path / "link").symlink_to(cache)
    assert verify(tmp_path / "link", checker) == []


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_verify_reports_a_shard_that_is_not_a_file(kind, cache, checker):
    (cache / SHARD).unlink()
    if kind == "pipe":
        os.mkfifo(cache / SHARD)
    else:
        (cache / SHARD).mkdir()
    problem = only_problem(cache, checker)
    assert problem.file == SHARD and "cannot be read" in problem.what


def test_verify_reports_an_unknown_schema(cache, checker):
    content = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    (cache / "manifest.json").write_text(json.dumps({**content, "schema": 2}), encoding="utf-8")
    assert "schema version 2; this llava-twophase reads version 1" in only_problem(cache, checker).what


def test_verify_reports_a_damaged_quarantine(cache, checker):
    (cache / "quarantine.jsonl").write_text("{\n", encoding="utf-8")
    assert only_problem(cache, checker).file == "quarantine.jsonl"


def test_verify_refuses_a_path_that_is_not_a_folder(tmp_path):
    with pytest.raises(UserError, match="is not a folder; expected a feature cache"):
        verify(tmp_path / "nothing")


def test_verify_reports_an_empty_folder(tmp_path):
    assert "is not a feature cache" in verify(tmp_path)[0].what


def test_verify_and_reader_survive_mutated_manifests(cache, checker):
    original = (cache / "manifest.json").read_bytes()
    chance, refused = random.Random(0), 0
    for _ in range(300):
        content = bytearray(original)
        for _ in range(chance.choice((1, 1, 3))):
            place = chance.randrange(len(content))
            content[place : place + chance.choice((0, 1, 1, 5))] = bytes(
                chance.choices(b'0-9"{}[],:\0\xffe.', k=chance.choice((0, 1, 2)))
            )
        (cache / "manifest.json").write_bytes(content)
        refused += bool(verify(cache, checker))
        with suppress(UserError):
            FeatureCache(cache, allow_incomplete=True).read_raw([])
    assert refused > 200


def test_verify_finds_every_changed_row_of_mutated_shards(tmp_path, checker):
    cache, keys, stored = make_cache(tmp_path / "cache", counts=(5,))
    original, manifest = (cache / SHARD).read_bytes(), (cache / "manifest.json").read_bytes()
    chance = random.Random(0)
    used = [place for place in range(USER_BLOCK, len(original)) if original[place]]

    def edit(data, header):
        for _ in range(chance.choice((1, 1, 3))):
            data[chance.choice(used)] = chance.randrange(256)

    for _ in range(150):
        (cache / SHARD).write_bytes(original)
        (cache / "manifest.json").write_bytes(manifest)
        reseal(cache, 0, edit)
        if not verify(cache, checker):
            np.testing.assert_array_equal(FeatureCache(cache).read_raw(keys), stored)


def test_verify_reports_absurd_sizes(cache, checker, monkeypatch):
    monkeypatch.setattr("llava_twophase.cache.check.verify._LIMIT", 100)
    assert {problem.what for problem in verify(cache, checker)} >= {"it states absurd sizes: 5 rows of 576 bytes"}


def test_fuzz_script_finds_no_fault_in_a_short_run(tmp_path, checker, monkeypatch):
    from benchmarks.fuzz_cache import fuzz

    monkeypatch.setattr(hdf5, "SECONDS", 4.0)
    found = fuzz(tmp_path, 200, 7, checker)
    assert found["manifest_refused"] + found["shard_refused"] + found["header_refused"] + found["sealed_refused"] > 100


@pytest.mark.parametrize("key", [[], {}, [["a"]]], ids=str)
def test_verify_reports_a_quarantine_with_a_key_that_is_not_text(key, cache, checker):
    (cache / "quarantine.jsonl").write_text(json.dumps({"key": key, "reason": "x"}), encoding="utf-8")
    assert "is damaged" in only_problem(cache, checker).what
