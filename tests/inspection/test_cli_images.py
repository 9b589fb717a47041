"""Subcommands that read images, with files and archives that are damaged, hostile or missing."""

import json
import os
import shutil
import tarfile
import zipfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from inspection.command import inspect
from llava_twophase import CacheWriter
from llava_twophase.inspection.rows import CheckedRows

BAD = {
    "html.jpg": b"<!DOCTYPE html><html>404</html>",
    "empty.jpg": b"",
    "truncated.jpg": None,
    "folder.jpg": "folder",
    "fifo.jpg": "fifo",
    "loop.jpg": "loop",
    "missing.jpg": "missing",
    "bomb.png": "bomb",
}
GOOD = ("good.png", "thin/wide.png", "thin/tall.png")


def png(size, mode="RGB", colour="red"):
    buffer = BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A cache of images, most of which became unusable after extraction, and their folder."""
    root = tmp_path_factory.mktemp("hostile")
    folder = root / "images"
    (folder / "thin").mkdir(parents=True)
    contents = {"good.png": png((40, 30)), "thin/wide.png": png((20_000, 1)), "thin/tall.png": png((1, 20_000))}
    with CacheWriter(root / "cache", (9, 32), "float32", {"image_aspect_ratio": "pad"}) as cache:
        random = np.random.default_rng(0)
        for key in (*GOOD, *BAD):
            cache.add(key, random.standard_normal((9, 32)).astype(np.float32), contents.get(key, b"as it was"))
    for key, data in contents.items():
        (folder / key).write_bytes(data)
    for key, kind in BAD.items():
        path = folder / key
        if isinstance(kind, bytes):
            path.write_bytes(kind)
    (folder / "truncated.jpg").write_bytes(contents["good.png"][:60])
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "fifo.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "bomb.png").write_bytes(png((14_000, 14_000), "1", 0))
    return root / "cache", folder


@pytest.mark.parametrize("key", BAD)
def test_show_reports_an_unusable_image_in_one_line(key, hostile, tmp_path):
    cache, folder = hostile
    errors = inspect("show", cache, key, "-o", tmp_path / "o.png", "--image_folder", folder, expect=1).stderr
    assert errors.startswith(f"error: {folder / key}: ") and len(errors.splitlines()) == 1
    assert not (tmp_path / "o.png").exists()


def test_show_reports_all_unusable_images_together(hostile, tmp_path):
    cache, folder = hostile
    errors = inspect("show", cache, *BAD, *GOOD, "-o", tmp_path / "o.png", "--image_folder", folder, expect=1).stderr
    assert f"{len(BAD)} of {len(BAD) + len(GOOD)} images cannot be shown" in errors
    assert all(f"  {folder / key}: " in errors for key in BAD)


def test_show_draws_thin_images(hostile, tmp_path):
    cache, folder = hostile
    inspect("show", cache, *GOOD, "-o", tmp_path / "o.png", "--image_folder", folder, "--size", "64")
    with Image.open(tmp_path / "o.png") as sheet:
        assert sheet.width == 3 * 64 + 4 * 12


def test_show_refuses_a_picture_that_would_not_fit_memory(hostile, tmp_path):
    cache, folder = hostile
    keys = [GOOD[0]] * 30
    command = ["show", cache, *keys, "-o", tmp_path / "o.png", "--image_folder", folder, "--size", "4096"]
    errors = inspect(*command, expect=1).stderr
    assert errors.startswith("error: 30 images at --size 4096: a picture of ") and "smaller --size" in errors


def test_report_shows_usable_images_and_the_reason_for_others(hostile, tmp_path):
    cache, folder = hostile
    inspect("report", cache, "-o", tmp_path / "r.html", "--image_folder", folder)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.count('class="card"') == len(BAD) + len(GOOD)
    assert text.count("the image as the tower saw it of") == len(GOOD) and text.count("the image: ") == len(BAD)


def test_verify_reports_each_image_that_is_not_as_it_was(hostile):
    cache, folder = hostile
    values = json.loads(inspect("verify", cache, "--sources", folder, "--json", expect=1).stdout)
    assert {problem["file"] for problem in values["problems"]} == set(BAD)


def archive_of(folder, path, prefix="", extra=(), without=None):
    """Pack the usable images of a folder, with other entries beside them."""
    files = {f"{prefix}{key}": (folder / key).read_bytes() for key in GOOD if key != without}
    files |= dict.fromkeys(extra, b"other")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w") as archive:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, BytesIO(data))
    return path


@pytest.fixture(scope="module")
def usable(hostile, tmp_path_factory):
    """A cache of the usable images, and their folder."""
    _, folder = hostile
    path = tmp_path_factory.mktemp("usable") / "cache"
    with CacheWriter(path, (9, 32), "float32", {}) as cache:
        for key in GOOD:
            cache.add(key, np.ones((9, 32), np.float32), folder / key)
    return path, folder


@pytest.mark.parametrize("suffix", ["zip", "tar"])
@pytest.mark.parametrize("extra", [(), (".DS_Store", "__MACOSX/._good.png", "notes.txt")], ids=["plain", "others"])
@pytest.mark.parametrize("prefix", ["", "images/", "data/set/images/", "./", "/data/"])
def test_verify_reads_sources_from_archives(prefix, extra, suffix, usable, tmp_path):
    cache, folder = usable
    archive = archive_of(folder, tmp_path / f"images.{suffix}", prefix, extra)
    assert "unchanged" in inspect("verify", cache, "--sources", archive).stdout


@pytest.mark.parametrize("subcommand", ["verify", "show", "report", "reencode"])
def test_image_that_an_archive_lacks_does_not_hide_the_others(subcommand, usable, tmp_path):
    """The folder inside the archive is found although the first image that is read is missing."""
    cache, folder = usable
    archive = archive_of(folder, tmp_path / "images.zip", "images/", without=GOOD[0])
    if subcommand == "verify":
        values = json.loads(inspect("verify", cache, "--sources", archive, "--json", expect=1).stdout)
        assert [problem["file"] for problem in values["problems"]] == [GOOD[0]]
    elif subcommand == "show":
        errors = inspect("show", cache, *GOOD, "-o", tmp_path / "o.png", "--image_folder", archive, expect=1).stderr
        assert errors.startswith(f"error: {archive / GOOD[0]}: ") and len(errors.splitlines()) == 1
    elif subcommand == "report":
        inspect("report", cache, "-o", tmp_path / "r.html", "--image_folder", archive)
        text = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert text.count("the image as the tower saw it of") == len(GOOD) - 1
    else:
        images = CheckedRows(cache).open_images(str(archive))
        assert [*images.missing(GOOD)] == [GOOD[0]]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"plain text"], ids=["empty", "zip", "text"])
@pytest.mark.parametrize("subcommand", ["verify", "show", "report", "reencode"])
def test_archive_that_cannot_be_opened_is_one_error_before_the_work(subcommand, content, usable, tmp_path, monkeypatch):
    cache, _ = usable
    archive = tmp_path / "images.zip"
    archive.write_bytes(content)
    rest = {
        "verify": ["--sources", archive],
        "show": [GOOD[0], "-o", tmp_path / "o.png", "--image_folder", archive],
        "report": ["-o", tmp_path / "r.html", "--image_folder", archive],
        "reencode": ["--image_folder", archive],
    }[subcommand]
    monkeypatch.setattr("llava_twophase.inspection.check.verify", lambda *_: pytest.fail("the cache was read"))
    monkeypatch.setattr("llava_twophase.inspection.rows.CheckedRows.stored", lambda *_: pytest.fail("rows were read"))
    errors = inspect(subcommand, cache, *rest, expect=1).stderr
    assert errors.startswith("error: ") and str(archive) in errors and len(errors.splitlines()) == 1


def test_one_damaged_entry_of_a_zip_is_one_problem(usable, tmp_path):
    cache, folder = usable
    archive = archive_of(folder, tmp_path / "images.zip")
    data = bytearray(archive.read_bytes())
    place = data.index((folder / GOOD[0]).read_bytes())
    data[place + 20] ^= 1
    archive.write_bytes(data)
    values = json.loads(inspect("verify", cache, "--sources", archive, "--json", expect=1).stdout)
    assert [problem["file"] for problem in values["problems"]] == [GOOD[0]]


def test_image_folder_that_disappears_is_one_error(usable, tmp_path):
    cache, folder = usable
    shutil.copytree(folder / "thin", tmp_path / "images")
    for flag, subcommand in (("--sources", "verify"), ("--image_folder", "reencode")):
        errors = inspect(subcommand, cache, flag, tmp_path / "none", expect=1).stderr
        assert errors.startswith("error: ") and str(tmp_path / "none") in errors and len(errors.splitlines()) == 1
