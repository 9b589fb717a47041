"""Tar archives: links, joined, truncated and damaged archives."""

import tarfile

import pytest

from llava_twophase.errors import UserError
from llava_twophase.vision.images import BadImage
from llava_twophase.vision.sources import open_images
from vision.make_archives import make_tar, tar_of


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_are_followed_inside_the_archive(tmp_path):
    path = tar_of(
        tmp_path / "a.tar",
        link("images/forward.jpg", "../originals/a.jpg"),
        ("originals/a.jpg", b"a"),
        link("images/hard.jpg", "originals/a.jpg", tarfile.LNKTYPE),
        link("images/chain.jpg", "hard.jpg"),
        link("images/gone.jpg", "nowhere.jpg"),
        link("images/outside.jpg", "/etc/passwd"),
        link("images/loop.jpg", "loop.jpg"),
    )
    images = open_images(path)
    keys = [f"images/{name}.jpg" for name in ("forward", "hard", "chain")]
    assert images.missing(keys) == {} and [images.read(key) for key in keys] == [b"a"] * 3
    for name in ("gone", "outside", "loop"):
        with pytest.raises(BadImage, match="it is a link to a file that is not in the archive"):
            images.read(f"images/{name}.jpg")


def test_empty_and_special_files(tmp_path):
    pipe = tarfile.TarInfo("pipe.jpg")
    pipe.type = tarfile.FIFOTYPE
    images = open_images(tar_of(tmp_path / "a.tar", ("empty.jpg", b""), pipe, ("good.jpg", b"x")))
    with pytest.raises(BadImage, match="the file is empty"):
        images.read("empty.jpg")
    with pytest.raises(BadImage, match="it is a special file"):
        images.open("pipe.jpg")
    assert images.read("good.jpg") == b"x"


def test_joined_archives_are_read_to_the_end(tmp_path):
    first, second = tar_of(tmp_path / "1.tar", ("a.jpg", b"a")), tar_of(tmp_path / "2.tar", ("b.jpg", b"b"))
    path = tmp_path / "joined.tar"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    images = open_images(path)
    assert images.missing(["a.jpg", "b.jpg"]) == {} and images.read("b.jpg") == b"b"


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_truncated_archive_is_reported_by_name(tmp_path, image_set, keep):
    path = make_tar(tmp_path / "images.tar", image_set.folder)
    with tarfile.open(path) as archive:
        last = [member for member in archive if member.isreg()][int(20 * keep)]
    path.write_bytes(path.read_bytes()[: last.offset_data + last.size // 2])
    with pytest.raises(UserError, match="images.tar is a damaged or truncated tar archive"):
        open_images(path).missing(image_set.keys)


@pytest.mark.parametrize("extra", [0, 100])
def test_archive_truncated_between_two_files_is_reported_beside_missing_images(tmp_path, extra):
    path = tar_of(tmp_path / "a.tar", ("a.jpg", b"a"), ("b.jpg", b"b"))
    assert open_images(path).missing(["a.jpg", "c.jpg"]) == {"c.jpg": "the file is missing"}
    with tarfile.open(path) as archive:
        end = archive.getmember("b.jpg").offset + extra
    path.write_bytes(path.read_bytes()[:end])
    images = open_images(path)
    reason = "the file is missing; a.tar has no end marker: it is truncated"
    assert images.missing(["a.jpg", "b.jpg"]) == {"b.jpg": reason} and images.read("a.jpg") == b"a"


def test_damaged_header_costs_one_file(tmp_path):
    path = tar_of(tmp_path / "a.tar", ("a.jpg", b"a"), ("b.jpg", b"b"), ("c.jpg", b"c"))
    with tarfile.open(path) as archive:
        offset = archive.getmember("b.jpg").offset
    data = bytearray(path.read_bytes())
    data[offset + 10] ^= 255
    path.write_bytes(data)
    images = open_images(path)
    assert list(images.missing(["a.jpg", "b.jpg", "c.jpg"])) == ["b.jpg"] and images.read("c.jpg") == b"c"


def test_sparse_file_is_not_read_as_something_else(tmp_path):
    info = tarfile.TarInfo("sparse.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    images = open_images(tar_of(tmp_path / "a.tar", ("a.jpg", b"a"), info))
    with pytest.raises(BadImage, match="sparse"):
        images.read("sparse.jpg")
