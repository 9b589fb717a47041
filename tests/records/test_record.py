"""Image keys of records."""

import pytest

from llava_twophase.errors import UserError
from llava_twophase.records import normalize_key


@pytest.mark.parametrize("spelling", ["absolute", "relative", "trailing slash", "link", "linked path", "dots"])
def test_normalize_key_accepts_an_absolute_path_inside_the_image_folder(spelling, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "images"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    path = folder / "a" / "ü 1.jpg"
    given = {
        "relative": "data/images",
        "trailing slash": f"{folder}/",
        "link": tmp_path / "link" / "images",
        "dots": "data/../data/./images",
    }.get(spelling, folder)
    if spelling == "linked path":
        path = tmp_path / "link" / "images" / "a" / "ü 1.jpg"
    assert normalize_key(str(path), given) == "a/ü 1.jpg"
    assert normalize_key("a/ü 1.jpg", given) == "a/ü 1.jpg"


@pytest.mark.parametrize("path", ["/etc/a.jpg", "{folder}", "{folder}/../b.jpg", "{folder}x/a.jpg", "/"])
def test_normalize_key_refuses_an_absolute_path_outside_the_image_folder(path, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(UserError, match=f"must stay inside --image_folder {folder}"):
        normalize_key(path.format(folder=folder), folder)


@pytest.mark.parametrize(
    ("image", "key"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("./a//b.jpg", "a/b.jpg"),
        ("a/./c/../b.jpg", "a/b.jpg"),
        ("..a/b.jpg", "..a/b.jpg"),
        ("a b/ü 雪.png", "a b/ü 雪.png"),
    ],
)
def test_normalize_key_removes_dots_and_repeated_slashes(image, key):
    assert normalize_key(image) == key
