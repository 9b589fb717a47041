"""Checks of all image files before any of them is decoded."""

import shutil

import pytest

from llava_twophase.errors import UserError
from llava_twophase.vision import precheck
from llava_twophase.vision.precheck import find_bad_headers, require_images
from llava_twophase.vision.sources import open_images
from vision.make_archives import make_zip


@pytest.fixture
def broken(image_set, tmp_path):
    folder = shutil.copytree(image_set.folder, tmp_path / "images")
    (folder / image_set.keys[1]).write_text("not an image", encoding="utf-8")
    (folder / image_set.keys[5]).write_bytes(b"")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_find_bad_headers_keeps_the_order(image_set, broken, workers, kind, monkeypatch, tmp_path):
    monkeypatch.setattr(precheck, "_FILES_PER_BATCH", 3)
    source = open_images(make_zip(tmp_path / "a.zip", broken) if kind == "zip" else broken)
    assert find_bad_headers(source, image_set.keys, workers) == {
        image_set.keys[1]: "cannot be decoded: it is a text file",
        image_set.keys[5]: "the file is empty",
    }


def test_require_images_reports_missing_and_unusable_images(image_set, broken):
    source = open_images(broken)
    (broken / image_set.keys[2]).unlink()
    with pytest.raises(UserError) as caught:
        require_images(source, [*image_set.keys, image_set.keys[1]], broken)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"1 of 29 images is missing in --image_folder {broken}, 2 cannot be used; fix them")
    assert [line.split(": ")[0].strip() for line in lines] == [image_set.keys[n] for n in (2, 1, 5)]


def test_require_images_accepts_good_ones(image_set):
    source = open_images(image_set.folder)
    require_images(source, image_set.keys, image_set.folder)
    with pytest.raises(UserError, match="1 of 30 images is missing"):
        require_images(source, [*image_set.keys, "absent.jpg"], image_set.folder)
