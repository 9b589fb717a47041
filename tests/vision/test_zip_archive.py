"""Zip archives: names, damaged, joined and truncated archives, and the 64-bit extension."""

import io
import zipfile

import pytest

from llava_twophase.errors import UserError
from llava_twophase.vision.images import BadImage
from llava_twophase.vision.sources import open_images
from vision.make_archives import make_zip, zip_of


def test_backslashes_of_windows_are_separators(tmp_path):
    path = zip_of(tmp_path / "a.zip", ("images\\00\\a.jpg", b"a"), ("images\\01\\b.jpg", b"b"))
    images = open_images(path)
    assert images.missing(["00/a.jpg", "01/b.jpg"]) == {} and images.read("01/b.jpg") == b"b"


@pytest.mark.parametrize("raw", ["übersicht 雪.jpg".encode(), "übersicht.jpg".encode("cp437")])
def test_names_without_the_utf8_flag_are_found(tmp_path, raw):
    name = raw.decode("utf-8" if b"\xe9" in raw else "cp437")
    images = open_images(zip_of(tmp_path / "a.zip", ("good.jpg", b"g"), (raw, b"x")))
    assert images.missing(["good.jpg", name]) == {} and images.read(name) == b"x"


def test_name_that_is_not_utf8_spoils_no_other(tmp_path):
    path = zip_of(tmp_path / "a.zip", ("good.jpg", b"g"), ("é.jpg", b"x"))
    path.write_bytes(path.read_bytes().replace("é.jpg".encode(), b"\xff\xff.jpg"))  # the UTF-8 flag stays
    images = open_images(path)
    assert list(images.missing(["good.jpg", "é.jpg"])) == ["é.jpg"] and images.read("good.jpg") == b"g"
    assert images.read("\udcff\udcff.jpg") == b"x"


def test_flipped_byte_is_noticed(tmp_path, image_set):
    key = image_set.keys[0]
    path = make_zip(tmp_path / "images.zip", image_set.folder)
    data = bytearray(path.read_bytes())
    content = (image_set.folder / key).read_bytes()
    data[data.index(content) + len(content) // 2] ^= 1
    path.write_bytes(data)
    images = open_images(path)
    with pytest.raises(BadImage, match="checksum is wrong"):
        images.read(key)
    assert images.read(image_set.keys[1])


@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_truncated_archive_is_reported_by_name(tmp_path, image_set, keep):
    path = make_zip(tmp_path / "images.zip", image_set.folder)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match="images.zip is a truncated zip archive"):
        open_images(path)


def test_archive_without_its_beginning_is_reported_by_name(tmp_path, image_set):
    path = make_zip(tmp_path / "images.zip", image_set.folder)
    path.write_bytes(path.read_bytes()[1000:])
    with pytest.raises(UserError, match="images.zip is a damaged zip archive: it is truncated at its beginning"):
        open_images(path).prepare()


def test_damaged_index_is_reported_by_name(tmp_path):
    path = zip_of(tmp_path / "a.zip", ("a.jpg", b"a"), ("b.jpg", b"b"))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2")] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        UserError, match="a.zip is a damaged zip archive: its index has 2 files, of which 1 can be read"
    ):
        open_images(path).prepare()


def test_joined_archives_are_reported_by_name(tmp_path):
    first, second = zip_of(tmp_path / "1.zip", ("a.jpg", b"a")), zip_of(tmp_path / "2.zip", ("b.jpg", b"b"))
    path = tmp_path / "joined.zip"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match="joined.zip is a damaged zip archive: several archives were joined"):
        open_images(path).prepare()


def test_data_before_the_archive_is_skipped(tmp_path):
    path = zip_of(tmp_path / "a.zip", ("a.jpg", b"a"))
    path.write_bytes(b"#!/bin/sh\nexit\n" + path.read_bytes())
    assert open_images(path).read("a.jpg") == b"a"


def test_64_bit_archive_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a.jpg", "b.jpg"):
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(name.encode())
        archive.filelist[1].file_size = archive.filelist[1].compress_size = 0xFFFFFFFF  # forces the wide fields
    path = tmp_path / "a.zip"
    data = path.read_bytes()
    wide = (0xFFFFFFFF).to_bytes(8, "little")
    path.write_bytes(data.replace(wide + wide, (5).to_bytes(8, "little") * 2))
    assert open_images(path).read("b.jpg") == b"b.jpg"


def test_encrypted_entry_is_reported(tmp_path):
    path = zip_of(tmp_path / "a.zip", ("a.jpg", b"a"), ("b.jpg", b"b"))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    images = open_images(path)
    with pytest.raises(BadImage, match="encrypted"):
        images.read("b.jpg")
    assert images.read("a.jpg") == b"a"


def test_entry_larger_than_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_twophase.vision.sources.MAX_FILE_BYTES", 1000)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(2000))
    with pytest.raises(BadImage, match="2,000 bytes, more than the 1,000 bytes"):
        open_images(path).read("bomb.jpg")


def test_open_reads_only_what_is_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(range(256)) * 40_000)
    images = open_images(path)
    images.prepare()
    read, real = [], images.read_at
    monkeypatch.setattr(images, "read_at", lambda offset, count: read.append(count) or real(offset, count))
    with images.open("a.jpg") as file:
        assert isinstance(file, io.BufferedReader) and file.read(300) == (bytes(range(256)) * 2)[:300]
    assert sum(read) < 40_000
