"""Pictures read from archives are the bytes of the folder they were made of."""

import os
import pickle
import tarfile
import zipfile

import pytest

from helpers import run
from llava_twophase.errors import UserError
from llava_twophase.vision.images import BadImage, ImageFolder, open_images


def make_zip(path, folder, prefix="", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return path


def make_tar(path, folder, prefix="", kind=tarfile.PAX_FORMAT, mode="w"):
    with tarfile.open(path, mode, format=kind) as archive:
        archive.add(folder, prefix or ".")
    return path


MAKERS = {
    "stored": make_zip,
    "deflated": lambda path, folder: make_zip(path, folder, compression=zipfile.ZIP_DEFLATED),
    "zip with a top folder": lambda path, folder: make_zip(path, folder, "images/"),
    "pax tar": make_tar,
    "gnu tar": lambda path, folder: make_tar(path, folder, kind=tarfile.GNU_FORMAT),
    "tar with a top folder": lambda path, folder: make_tar(path, folder, "images"),
}


@pytest.fixture(params=MAKERS, scope="module")
def archive(request, image_set, tmp_path_factory):
    return MAKERS[request.param](tmp_path_factory.mktemp("archive") / "images", image_set.folder)


def test_every_file_is_the_folders(image_set, archive):
    images, folder = open_images(archive), ImageFolder(image_set.folder)
    assert images.missing(image_set.keys) == []
    for key in image_set.keys:
        assert images.read(key) == folder.read(key)


def test_missing_keys_keep_their_order(image_set, archive):
    images = open_images(archive)
    assert images.missing(["z.jpg", image_set.keys[0], "odd", "a.jpg"]) == ["z.jpg", "odd", "a.jpg"]
    with pytest.raises(BadImage, match="No such file"):
        images.read("z.jpg")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_an_archive_goes_to_other_processes(image_set, archive):
    images = open_images(archive)
    key = image_set.keys[0]
    wanted = images.read(key)
    assert pickle.loads(pickle.dumps(images)).read(key) == wanted
    pid = os.fork()
    if pid == 0:
        os._exit(0 if images.read(key) == wanted else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_name_that_no_locale_knows(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "übersicht 雪.png").write_bytes(b"x")
    for path in (
        tmp_path / "in",
        make_zip(tmp_path / "a.zip", tmp_path / "in"),
        make_tar(tmp_path / "b.tar", tmp_path / "in"),
    ):
        code = f"""
from llava_twophase.vision.images import open_images
print(open_images({str(path)!r}).read({ascii("übersicht 雪.png")}))
"""
        assert run(["python", "-c", code], LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").stdout == "b'x'\n"


def test_of_two_files_with_one_name_the_later_counts(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"old")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "a.jpg", "a.jpg")
        (tmp_path / "a.jpg").write_bytes(b"new")
        archive.add(tmp_path / "a.jpg", "a.jpg")
    assert open_images(path).read("a.jpg") == b"new"


def test_a_flipped_byte_in_a_zip_is_noticed(tmp_path, image_set):
    key = image_set.keys[0]
    path = make_zip(tmp_path / "images.zip", image_set.folder)
    data = bytearray(path.read_bytes())
    content = (image_set.folder / key).read_bytes()
    data[data.index(content) + len(content) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadImage, match="checksum is wrong"):
        open_images(path).read(key)


def test_empty_files_and_links_in_a_tar(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty.jpg").touch()
    (tmp_path / "in" / "link.jpg").symlink_to("/etc/passwd")
    images = open_images(make_tar(tmp_path / "a.tar", tmp_path / "in"))
    with pytest.raises(BadImage, match="empty"):
        images.read("empty.jpg")
    assert images.missing(["link.jpg"]) == ["link.jpg"]


def test_a_compressed_tar_is_refused_with_the_way_out(tmp_path, image_set):
    path = make_tar(tmp_path / "images.tar.gz", image_set.folder, mode="w:gz")
    with pytest.raises(UserError, match="decompress it to .tar"):
        open_images(path)


def test_no_archive_at_all(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="no zip or uncompressed tar"):
        open_images(tmp_path / "x.zip")
    with pytest.raises(UserError, match="neither a folder nor"):
        open_images(tmp_path / "nowhere")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(UserError, match="holds no files"):
        open_images(tmp_path / "empty.zip").prepare()
