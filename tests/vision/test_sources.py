"""Image files in a folder, where every entry may be something else than a file."""

import io
import os
import socket
import tracemalloc
import unicodedata

import pytest

from llava_twophase.errors import UserError
from llava_twophase.vision import sources
from llava_twophase.vision.images import BadImage
from llava_twophase.vision.sources import ImageFolder, open_images

# With few names each is asked for, with many the folder is listed.
MANY = 40


def odd_folder(folder):
    """A folder of usable images and of entries that only look like some; returns {name: reason}."""
    for number in range(MANY):
        (folder / f"{number}.jpg").write_bytes(b"x")
    (folder / "empty.jpg").touch()
    (folder / "folder.jpg").mkdir()
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "socket.jpg"))
    return {
        "empty.jpg": "the file is empty",
        "folder.jpg": "it is a folder, not a regular file",
        "loop.jpg": "cannot be read: Too many levels of symbolic links",
        "dangling.jpg": "it is a symbolic link to a file that does not exist",
        "zero.jpg": "it is a device, not a regular file",
        "pipe.jpg": "it is a named pipe, not a regular file",
        "socket.jpg": "it is a socket, not a regular file",
        "absent.jpg": "cannot be read: No such file or directory",
    }


def test_read_reports_the_true_reason(tmp_path):
    reasons = odd_folder(tmp_path)
    images = ImageFolder(tmp_path)
    for name, reason in reasons.items():
        for call in (images.read, images.open):
            with pytest.raises(BadImage) as caught:
                call(name)
            assert str(caught.value) == reason


@pytest.mark.parametrize("few", [True, False])
def test_missing_finds_only_names_that_do_not_exist(tmp_path, few):
    reasons = odd_folder(tmp_path)
    good = [f"{number}.jpg" for number in range(5 if few else MANY)]
    asked = [*good, *reasons, "sub/absent.jpg"]
    if few:
        found = {key: reason for key in asked for key, reason in ImageFolder(tmp_path).missing([key]).items()}
    else:
        found = ImageFolder(tmp_path).missing(asked)
    assert found == dict.fromkeys(["dangling.jpg", "absent.jpg", "sub/absent.jpg"], "the file is missing")


def test_missing_keeps_the_order(image_set):
    images = ImageFolder(image_set.folder)
    assert images.missing(image_set.keys) == {}
    many = [f"odd/{number}.png" for number in range(MANY)]
    assert list(images.missing(["nowhere/a.png", *many, *image_set.keys])) == ["nowhere/a.png", *many]
    assert list(images.missing([f"nowhere/{number}" for number in range(MANY)])) == [
        f"nowhere/{number}" for number in range(MANY)
    ]


def test_difference_in_case_is_only_reported(tmp_path):
    (tmp_path / "A.JPG").write_bytes(b"x")
    assert ImageFolder(tmp_path).missing(["a.jpg", "b.jpg"]) == {
        "a.jpg": "the file is missing; 'A.JPG' differs only in upper and lower case",
        "b.jpg": "the file is missing",
    }


@pytest.mark.parametrize("count", [1, MANY])
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_other_normalisation_form_is_found(tmp_path, forms, count):
    names = [f"é/ü {number}.jpg" for number in range(count)]
    written, asked = ([unicodedata.normalize(form, name) for name in names] for form in forms)
    (tmp_path / written[0]).parent.mkdir()
    for name in written:
        (tmp_path / name).write_bytes(name.encode())
    images = ImageFolder(tmp_path)
    assert images.missing(asked) == {}
    assert [images.read(name).decode() for name in asked] == written


def test_mixed_normalisation_forms_are_found(tmp_path):
    folder, name = unicodedata.normalize("NFD", "é"), unicodedata.normalize("NFC", "ü.jpg")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / name).write_bytes(b"x")
    key = unicodedata.normalize("NFC", folder) + "/" + unicodedata.normalize("NFD", name)
    assert ImageFolder(tmp_path).missing([key]) == {} and ImageFolder(tmp_path).read(key) == b"x"


def test_exact_name_wins_over_another_normalisation_form(tmp_path):
    names = [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    assert [ImageFolder(tmp_path).read(name).decode() for name in names] == names


@pytest.mark.parametrize("count", [1, MANY])
def test_odd_names_spoil_no_other(tmp_path, count):
    for number in range(MANY):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    (tmp_path / "line\nbreak.jpg").write_bytes(b"n")
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"s")
    images = ImageFolder(tmp_path)
    names = [f"{number}.jpg" for number in range(count)]
    odd = ["line\nbreak.jpg", "\udcff.jpg", "\ud800.jpg", "nul\0.jpg"]
    assert list(images.missing([*names, *odd])) in (["\ud800.jpg", "nul\0.jpg"], ["\ud800.jpg"])
    assert images.read("line\nbreak.jpg") == b"n" and images.read("\udcff.jpg") == b"s"
    for name in ("\ud800.jpg", "nul\0.jpg"):
        with pytest.raises(BadImage, match="cannot be read"):
            images.read(name)


def test_large_junk_is_not_read(tmp_path):
    with open(tmp_path / "junk.jpg", "wb") as file:
        file.write(os.urandom(1 << 16))
        file.truncate(3 << 30)
    with open(tmp_path / "zeros.jpg", "wb") as file:
        file.truncate(3 << 30)
    images = ImageFolder(tmp_path)
    with pytest.raises(BadImage, match="it is not an image, or its header is damaged"):
        images.read("junk.jpg")
    with pytest.raises(BadImage, match="it is nothing but zero bytes"):
        images.read("zeros.jpg")


def test_image_followed_by_gigabytes_is_refused(tmp_path, image_set):
    data = (image_set.folder / image_set.keys[0]).read_bytes()
    for size, usable in ((sources._CHECK_HEADER_FROM, True), (3 << 30, False)):
        with open(tmp_path / "image.png", "wb") as file:
            file.write(data)
            file.truncate(size)
        if usable:
            assert len(ImageFolder(tmp_path).read("image.png")) == size
        else:
            with pytest.raises(BadImage, match="the file has 3,221,225,472 bytes, more than"):
                ImageFolder(tmp_path).read("image.png")


def test_read_takes_the_memory_of_the_file(tmp_path):
    (tmp_path / "a.jpg").write_bytes(bytes(1000))
    images = ImageFolder(tmp_path)
    tracemalloc.start()
    images.read("a.jpg")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_open_images_refuses_other_paths(tmp_path):
    with pytest.raises(UserError, match="--image_folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere does not exist; expected a folder, or a .zip or .tar archive"):
        open_images(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a folder nor"):
        open_images(tmp_path / "pipe")


def test_read_of_a_file_is_the_file(image_set):
    images = open_images(image_set.folder)
    for key in image_set.keys:
        data = (image_set.folder / key).read_bytes()
        with images.open(key) as file:
            assert isinstance(file, io.BufferedReader) and file.read() == data == images.read(key)
