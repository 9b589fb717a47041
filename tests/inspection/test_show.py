"""``show``: the PNG, warnings about changed files, and errors."""

import shutil

import pytest
from PIL import Image

from cache.make import SHAPE, fingerprint_of, rows, write
from inspection.command import inspect
from llava_twophase.cache.format import SHARDS
from llava_twophase.cache.shard_writer import ShardSpec, ShardWriter, sha256

SHARD = "shards/shard-000000.h5"


def photo(path, size=(80, 40)):
    """An image whose left half is red and whose right half is blue."""
    width, height = size
    picture = Image.new("RGB", size, (220, 30, 30))
    picture.paste((30, 30, 220), (width // 2, 0, width, height))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


@pytest.fixture
def shown(tmp_path):
    """A cache of one image file and one empty file, and their folder."""
    folder = tmp_path / "images"
    data = photo(folder / "00" / "a b.png").read_bytes()
    (folder / "00" / "gone.png").write_bytes(b"")
    cache = tmp_path / "cache"
    (cache / SHARDS).mkdir(parents=True)
    spec = ShardSpec(SHAPE, "bfloat16", fingerprint_of("bfloat16"), {})
    writer = ShardWriter(cache / SHARD, ["00/a b.png", "00/gone.png"], spec)
    writer.append(rows(2), [(len(data), sha256(data)), (0, sha256(b""))])
    write(cache, [writer.seal()])
    return cache, folder


def test_show_draws_an_image(shown, tmp_path):
    cache, folder = shown
    output = tmp_path / "out.png"
    result = inspect("show", cache, "00/a b.png", "-o", output, "--image_folder", folder, "--size", "90")
    assert result.stdout == f"wrote {output}: 00/a b.png\n" and result.stderr == ""
    with Image.open(output) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert picture.width == 3 * 90 + 4 * 12
        # The crop is the centre square: half red, half blue.
        assert picture.getpixel((12 + 20, 12 + 45)) == (220, 30, 30)
        assert picture.getpixel((12 + 70, 12 + 45)) == (30, 30, 220)


def test_show_warns_about_a_changed_file(shown, tmp_path):
    cache, folder = shown
    photo(folder / "00" / "a b.png", (60, 40))
    result = inspect("show", cache, "00/a b.png", "-o", tmp_path / "o.png", "--image_folder", folder)
    assert "warning: 00/a b.png: the file is not the one that the features were made from" in result.stderr


@pytest.mark.parametrize(
    ("key", "output", "message"),
    [
        ("x/a b.png", "o.png", r"perhaps '00/a b.png'"),
        ("nothing.png", "o.png", "such as '00/a b.png'"),
        ("00/gone.png", "o.png", "the file is empty"),
        ("00/a b.png", "no/such/folder/o.png", "cannot be written"),
    ],
)
def test_show_reports_what_is_wrong(key, output, message, shown, tmp_path):
    cache, folder = shown
    result = inspect("show", cache, key, "-o", tmp_path / output, "--image_folder", folder, expect=1)
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_show_without_the_image_folder_is_one_error(shown, tmp_path):
    shutil.rmtree(shown[1])
    result = inspect("show", shown[0], "00/a b.png", "-o", tmp_path / "o.png", "--image_folder", shown[1], expect=1)
    assert result.stderr.startswith("error: ") and "--image_folder" in result.stderr


def test_show_draws_several_images_and_a_patch(original, tmp_path):
    output = tmp_path / "out.png"
    flags = ["-o", output, "--image_folder", original.images, "--size", "90", "--patch", "1,2"]
    inspect("show", original.cache, *original.keys[:3], *flags)
    with Image.open(output) as picture:
        assert picture.size == (4 * (90 + 12) + 12, 3 * (90 + 22 + 12) + 12)
