"""Images read from archives are the bytes of the folder that they were made of; a bad entry spoils no other."""

import os
import pickle
import tarfile
import unicodedata
import zipfile

import pytest
from PIL import Image

from helpers import run
from llava_twophase.errors import UserError
from llava_twophase.vision.images import BadImage, check_header
from llava_twophase.vision.sources import ImageFolder, open_images
from vision.make_archives import make_tar, make_zip, tar_of, zip_of

MAKERS = {
    "stored": make_zip,
    "deflated": lambda path, folder: make_zip(path, folder, compression=zipfile.ZIP_DEFLATED),
    "zip with a top folder": lambda path, folder: make_zip(path, folder, "images/"),
    "pax tar": make_tar,
    "gnu tar": lambda path, folder: make_tar(path, folder, kind=tarfile.GNU_FORMAT),
    "tar with a top folder": lambda path, folder: make_tar(path, folder, "images"),
}
OF_BOTH = {"zip": zip_of, "tar": tar_of}


@pytest.fixture(params=MAKERS, scope="module")
def archive(request, image_set, tmp_path_factory):
    return MAKERS[request.param](tmp_path_factory.mktemp("archive") / "images", image_set.folder)


@pytest.fixture(params=OF_BOTH)
def archive_of(request, tmp_path):
    return lambda *members: OF_BOTH[request.param](tmp_path / f"archive.{request.param}", *members)


def test_read_returns_the_folders_bytes(image_set, archive):
    images, folder = open_images(archive), ImageFolder(image_set.folder)
    assert images.missing(image_set.keys) == {}
    for key in image_set.keys:
        assert images.read(key) == folder.read(key)


def test_open_gives_a_file_that_pillow_can_read(image_set, archive):
    images = open_images(archive, image_set.keys)
    for key in image_set.keys:
        with images.open(key) as file:
            check_header(file)
            file.seek(0)
            with Image.open(file) as found, Image.open(image_set.folder / key) as wanted:
                assert found.convert("RGB").tobytes() == wanted.convert("RGB").tobytes()
            file.seek(-10, os.SEEK_END)
            assert file.read() == (image_set.folder / key).read_bytes()[-10:]
            file.seek(5)
            assert file.read(7) == (image_set.folder / key).read_bytes()[5:12]


def test_missing_keys_keep_their_order(image_set, archive):
    images = open_images(archive, image_set.keys)
    assert list(images.missing(["z.jpg", image_set.keys[0], "odd/no.png", "a.jpg"])) == ["z.jpg", "odd/no.png", "a.jpg"]
    with pytest.raises(BadImage, match="No such file"):
        images.read("z.jpg")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_archive_can_be_sent_to_other_processes(image_set, archive):
    images = open_images(archive)
    key = image_set.keys[0]
    wanted = images.read(key)
    assert pickle.loads(pickle.dumps(images)).read(key) == wanted
    pid = os.fork()
    if pid == 0:
        os._exit(0 if images.read(key) == wanted else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_names_do_not_depend_on_the_locale(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "übersicht 雪.png").write_bytes(b"x")
    sources = [
        tmp_path / "in",
        make_zip(tmp_path / "a.zip", tmp_path / "in"),
        make_tar(tmp_path / "b.tar", tmp_path / "in"),
    ]
    code = f"""
from llava_twophase.vision.sources import open_images
for path in {[str(path) for path in sources]!r}:
    print(open_images(path).read({ascii("übersicht 雪.png")}))
"""
    assert run(["python", "-c", code], LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").stdout == "b'x'\n" * 3


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_last_of_two_files_with_one_name_counts(archive_of):
    assert open_images(archive_of(("a.jpg", b"old"), ("b.jpg", b"b"), ("a.jpg", b"new"))).read("a.jpg") == b"new"


LAYOUTS = {
    "debris beside the top folder": [
        "README.md", ".DS_Store", "__MACOSX/images/._a.jpg", "Thumbs.db", "images/00/a.jpg", "images/01/b.jpg",
    ],
    "a deeper prefix": ["data/LLaVA-Pretrain/images/00/a.jpg", "data/LLaVA-Pretrain/images/01/b.jpg", "data/x.json"],
    "dots": ["./images/./00/a.jpg", "./images//01/b.jpg"],
    "absolute names": ["/data/images/00/a.jpg", "/data/images/01/b.jpg"],
    "a second, incomplete folder": ["images/00/a.jpg", "images/01/b.jpg", "thumbs/00/a.jpg"],
    "a stray copy of one image outside the folder": ["images/00/a.jpg", "images/01/b.jpg", "00/a.jpg"],
    "no prefix": ["00/a.jpg", "01/b.jpg", "images/00/a.jpg"],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_of_the_keys_is_found(archive_of, layout):
    names = LAYOUTS[layout]
    images = open_images(archive_of(*((name, name.encode()) for name in names)))
    keys = ["00/a.jpg", "01/b.jpg"]
    assert images.missing(keys) == {}
    assert [images.read(key).decode() for key in keys] == [next(n for n in names if n.endswith(key)) for key in keys]


def test_folder_of_keys_without_folder_is_found(archive_of):
    images = open_images(archive_of(("README", b"x"), ("deep/images/a.jpg", b"a"), ("deep/images/b.jpg", b"b")))
    assert images.missing(["a.jpg", "b.jpg"]) == {} and images.read("b.jpg") == b"b"


def test_two_folders_with_the_same_names_are_reported(archive_of):
    images = open_images(archive_of(("small/a.jpg", b"a"), ("large/a.jpg", b"A")), ["a.jpg"])
    (reason,) = images.missing(["a.jpg"]).values()
    assert reason == "the file is missing; the archive has files of this name below several folders (large/, small/)"
    with pytest.raises(BadImage, match="below several folders"):
        images.read("a.jpg")


def test_keys_decide_the_folder_before_workers_ask_for_one(archive_of):
    path = archive_of(("a/x.jpg", b"1"), ("a/y.jpg", b"2"), ("b/x.jpg", b"3"))
    assert open_images(path, ["x.jpg", "y.jpg"]).read("x.jpg") == b"1"


def test_difference_in_case_is_only_reported(archive_of):
    images = open_images(archive_of(("in/A.JPG", b"x"), ("in/b.jpg", b"y")), ["a.jpg", "b.jpg"])
    assert images.missing(["a.jpg", "b.jpg"]) == {
        "a.jpg": "the file is missing; 'in/A.JPG' differs only in upper and lower case"
    }


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_other_normalisation_form_is_found(archive_of, forms):
    written, asked = (unicodedata.normalize(form, "é/ü.jpg") for form in forms)
    images = open_images(archive_of((f"images/{written}", b"x")))
    assert images.missing([asked]) == {} and images.read(asked) == b"x"


def test_exact_name_wins_over_another_normalisation_form(archive_of):
    nfc, nfd = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))
    for order in ((nfc, nfd), (nfd, nfc)):
        images = open_images(archive_of(*((name, name.encode()) for name in order)))
        assert images.read(nfc) == nfc.encode() and images.read(nfd) == nfd.encode()


def test_odd_names_spoil_no_other(tmp_path):
    for number, name in enumerate(("line\nbreak.jpg", "a\udcff.jpg")):
        images = open_images(tar_of(tmp_path / f"{number}.tar", ("good.jpg", b"g"), (name, b"x")))
        assert images.missing(["good.jpg", name, "\ud800.jpg"]).keys() == {"\ud800.jpg"}
        assert images.read("good.jpg") == b"g" and images.read(name) == b"x"
    path = zip_of(tmp_path / "a.zip", ("good.jpg", b"g"), ("line\nbreak.jpg", b"x"))
    assert open_images(path).read("line\nbreak.jpg") == b"x"


def test_folder_with_the_name_of_an_image_is_reported(archive_of):
    images = open_images(archive_of(("a.jpg", b"x"), ("b.jpg/c.txt", b"x")))
    assert list(images.missing(["a.jpg", "b.jpg"])) == ["b.jpg"]


def test_folder_entry_with_the_name_of_an_image_is_reported(tmp_path):
    folder = tarfile.TarInfo("b.jpg")
    folder.type = tarfile.DIRTYPE
    for path in (
        tar_of(tmp_path / "a.tar", ("a.jpg", b"x"), folder),
        zip_of(tmp_path / "a.zip", ("a.jpg", b"x"), ("b.jpg/", b"")),
    ):
        with pytest.raises(BadImage, match="it is a folder"):
            open_images(path).open("b.jpg")


def test_zip_inside_a_tar_does_not_hide_the_tar(tmp_path):
    inner = zip_of(tmp_path / "inner.zip", ("other.jpg", b"x"))
    path = tar_of(tmp_path / "a.tar", ("a.jpg", b"a"), ("inner.zip", inner.read_bytes()))
    assert open_images(path).read("a.jpg") == b"a"


def test_open_images_refuses_other_files(tmp_path, image_set):
    path = make_tar(tmp_path / "images.tar.gz", image_set.folder, mode="w:gz")
    with pytest.raises(UserError, match="decompress it to .tar"):
        open_images(path)
    (tmp_path / "x.zip").write_bytes(b"something else")
    with pytest.raises(UserError, match="x.zip is not a zip or uncompressed tar"):
        open_images(tmp_path / "x.zip")
    with pytest.raises(UserError, match="empty.zip contains no files"):
        open_images(zip_of(tmp_path / "empty.zip")).prepare()
