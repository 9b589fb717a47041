"""Images that cannot be used: reported before the tower loads, or skipped and quarantined; never replaced."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import drawn
from extract.server import files
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.cache.reader import FeatureCache

HTML = b"<!DOCTYPE html><html><body>404 not found</body></html>"
BAD = ("00000/000000002.jpg", "00001/000000001.jpg", "odd/gray.jpg", "odd/tall.jpg", "other/same_name.png")


@pytest.fixture
def broken(image_set, tmp_path):
    """A copy of the image folder with a missing, an empty, a foreign, a truncated and a too large image: BAD."""
    folder = shutil.copytree(image_set.folder, tmp_path / "images")
    (folder / BAD[0]).write_bytes(HTML)
    (folder / BAD[1]).write_bytes((folder / BAD[1]).read_bytes()[:-300])
    (folder / BAD[2]).write_bytes(b"")
    (folder / BAD[3]).unlink()
    Image.new("1", (14000, 14000)).save(folder / BAD[4])
    return folder


def test_extract_reports_bad_images_before_the_tower_loads(server, command, broken, tmp_path):
    log = server.run(command(image_folder=broken, vision_tower="nowhere/to-be-loaded-from"), expect=1)
    assert "4 of 29 images" in log and "(1 missing)" in log and "--on_bad_image skip" in log
    for key, reason in (
        (BAD[0], "cannot be decoded"),
        (BAD[2], "the file is empty"),
        (BAD[3], "the file is missing"),
        (BAD[4], "exceeds limit"),
    ):
        assert any(line.strip().startswith(f"{key}: ") and reason in line for line in log.splitlines()), key
    assert not (tmp_path / "cache").exists()


def test_extract_stops_at_a_truncated_image(server, command, image_set, tmp_path):
    folder = shutil.copytree(image_set.folder, tmp_path / "images")
    key = image_set.keys[10]
    content = (folder / key).read_bytes()
    (folder / key).write_bytes(content[:-300])
    log = server.run(command(image_folder=folder), expect=1)
    assert f"{key}: cannot be decoded: image file is truncated" in log
    assert [path.name for path in (tmp_path / "cache" / "shards").iterdir()] == ["shard-000000.h5"]
    (folder / key).write_bytes(content)
    log = server.run(command(image_folder=folder))
    assert "8 images cached, 21 to encode" in log


def test_extract_with_skip_and_no_bad_image_gives_the_same_cache(server, command, expected_files, tmp_path):
    server.run(command(on_bad_image="skip"))
    assert files(tmp_path / "cache") == expected_files


def test_extract_with_skip_quarantines_bad_images(server, command, broken, image_set, tmp_path):
    cache = tmp_path / "cache"
    log = server.run(command(image_folder=broken, on_bad_image="skip"))
    assert "complete, 24 images in 4 shards" in log and "5 images quarantined" in log
    assert list(FeatureCache(cache).keys()) == [key for key in image_set.keys if key not in BAD]
    assert verify(cache) == []
    lines = (cache / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["key"] for entry in entries] == sorted(BAD)
    assert {tuple(entry) for entry in entries} == {("key", "reason", "source_sha256", "source_size")}
    by_key = read_quarantine(cache)
    assert by_key[BAD[0]].source_size == len(HTML)
    assert by_key[BAD[2]].source_sha256 is None and by_key[BAD[3]].source_sha256 is None
    assert sorted(path.name for path in (cache / "shards").iterdir()) == [f"shard-00000{n}.h5" for n in range(4)]


def test_rows_do_not_depend_on_skipped_images(server, command, broken, image_set, expected_files, tmp_path):
    """A batch that lost an image is not filled up from the next one, so all other batches are unchanged."""
    server.run(command(feature_cache=tmp_path / "all"))
    server.run(command(image_folder=broken, on_bad_image="skip"))
    left, every = FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "all")
    shards = [image_set.keys[start : start + 8] for start in range(0, 29, 8)]
    for batch in [shard[start : start + 3] for shard in shards for start in range(0, len(shard), 3)]:
        kept = [key for key in batch if key not in BAD]
        if len(kept) == len(batch):
            np.testing.assert_array_equal(left.read_raw(kept), every.read_raw(kept))
        elif kept:
            np.testing.assert_allclose(left.read_raw(kept), every.read_raw(kept), rtol=1e-4, atol=1e-5)


def test_second_run_tries_only_changed_images(server, command, broken, image_set, tmp_path):
    cache = tmp_path / "cache"
    skipping = command(image_folder=broken, on_bad_image="skip")
    server.run(skipping)
    before = files(cache)
    log = server.run(skipping)
    assert "nothing to do" in log and "5 images quarantined" in log
    assert files(cache) == before
    for key in (BAD[0], BAD[3]):  # one fixed, one added
        shutil.copy(image_set.folder / key, broken / key)
    (broken / BAD[2]).write_bytes(HTML)  # one bad for another reason
    log = server.run(skipping)
    assert "24 images cached, 3 to encode into 1 shard of" in log and "complete, 26 images" in log
    assert sorted(read_quarantine(cache)) == sorted([BAD[1], BAD[2], BAD[4]])
    assert read_quarantine(cache)[BAD[2]].source_size == len(HTML)
    after = files(cache)
    assert all(after[name] == before[name] for name in before if name.endswith(".h5"))
    assert "nothing to do" in server.run(skipping)


def test_extract_with_fail_reports_quarantined_images(server, command, broken, tmp_path):
    server.run(command(image_folder=broken, on_bad_image="skip"))
    before = files(tmp_path / "cache")
    log = server.run(command(image_folder=broken), expect=1)
    assert "5 of 29 images" in log and all(key in log for key in BAD)
    assert files(tmp_path / "cache") == before


def test_extract_with_skip_allows_a_shard_without_usable_images(server, command, image_set, tmp_path):
    folder = shutil.copytree(image_set.folder, tmp_path / "images")
    for key in image_set.keys[8:16]:
        (folder / key).write_bytes(HTML)
    flags = command(image_folder=folder, on_bad_image="skip")
    log = server.run(flags)
    assert "complete, 21 images in 3 shards" in log
    assert verify(tmp_path / "cache") == []
    assert "nothing to do" in server.run(flags)


def test_extract_refuses_data_without_usable_images(server, command, image_set, tmp_path):
    folder = shutil.copytree(image_set.folder, tmp_path / "images")
    for key in image_set.keys:
        (folder / key).write_bytes(HTML)
    flags = command(image_folder=folder, on_bad_image="skip")
    for _ in range(2):
        assert "no image could be used" in server.run(flags, expect=1)
    assert len(read_quarantine(tmp_path / "cache")) == 29
    shutil.copytree(image_set.folder, folder, dirs_exist_ok=True)
    assert "complete, 29 images" in server.run(flags)
    assert not (tmp_path / "cache" / "quarantine.jsonl").exists()


def test_extract_refuses_a_folder_without_any_of_the_images(server, command, tmp_path):
    (tmp_path / "empty").mkdir()
    log = server.run(command(image_folder=tmp_path / "empty", on_bad_image="skip"), expect=1)
    assert "none of the records' 29 images" in log
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_extract_from_an_archive_gives_the_same_cache(server, command, image_set, expected_files, tmp_path, kind):
    archive = shutil.make_archive(str(tmp_path / "images"), kind, image_set.folder)
    server.run(command(image_folder=archive, num_workers=2))
    assert files(tmp_path / "cache") == expected_files


def test_extract_makes_one_row_for_an_image_of_several_records(server, command, image_set, tmp_path):
    records = [drawn.make_record(str(i), image_set.keys[i % 3], f"caption {i}") for i in range(9)]
    log = server.run(command(data_path=drawn.write_records(records, tmp_path / "r.json")))
    assert "complete, 3 images in 1 shard" in log


def test_hostile_entries_spoil_only_themselves(server, command, image_set, tmp_path):
    """Under both policies the true reason is reported; a thin image is encoded like any other."""
    folder = shutil.copytree(image_set.folder, tmp_path / "images")
    keys = image_set.keys
    reasons = {
        keys[0]: "Too many levels of symbolic links",
        keys[1]: "it is a named pipe, not a regular file",
        keys[2]: "it is a device, not a regular file",
        keys[3]: "it is a Git LFS pointer",
        keys[4]: "it is nothing but zero bytes",
    }
    for key in keys[:6]:
        (folder / key).unlink()
    (folder / keys[0]).symlink_to((folder / keys[0]).name)
    os.mkfifo(folder / keys[1])
    (folder / keys[2]).symlink_to("/dev/zero")
    (folder / keys[3]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", encoding="utf-8")
    with open(folder / keys[4], "wb") as file:
        file.truncate(3 << 30)
    Image.new("RGB", (20000, 1), (200, 10, 10)).save(folder / keys[5], "PNG")
    log = server.run(command(image_folder=folder), expect=1)
    assert "5 of 29 images" in log and "(0 missing)" in log
    for key, reason in reasons.items():
        assert any(line.strip().startswith(f"{key}: ") and reason in line for line in log.splitlines()), key
    server.run(command(image_folder=folder, on_bad_image="skip"))
    found = read_quarantine(tmp_path / "cache")
    assert found.keys() == reasons.keys()
    assert all(reason in found[key].reason for key, reason in reasons.items())
