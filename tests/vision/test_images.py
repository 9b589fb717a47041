"""Pictures as LLaVA sees them, and every kind of file that is none."""

import io

import numpy as np
import pytest
from PIL import Image

import drawn
from llava_twophase.errors import UserError
from llava_twophase.vision.images import BadImage, ImageFolder, check_header, decode


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_every_odd_picture_is_what_convert_rgb_gives(image_set):
    images = ImageFolder(image_set.folder)
    for key in image_set.keys:
        with Image.open(image_set.folder / key) as picture:
            wanted = np.asarray(picture.convert("RGB"))
        found = decode(images.read(key))
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), wanted, err_msg=key)


def test_alpha_is_dropped_not_blended(image_set):
    picture = decode((image_set.folder / "odd/transparent.png").read_bytes())
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(drawn.transparent())[..., :3])


def test_exif_orientation_is_ignored(image_set):
    assert decode((image_set.folder / "odd/turned.jpg").read_bytes()).size == (96, 60)


def drawn_ramp():
    return np.add.outer(4 * np.arange(60), 4 * np.arange(60))


def test_sixteen_bits_clip_as_pillow_clips(image_set):
    values = np.asarray(decode((image_set.folder / "odd/sixteen_bit.png").read_bytes()))
    assert (values.astype(int) == np.minimum(drawn_ramp(), 255)[..., None]).all()


def test_the_kind_is_told_by_content_not_by_name(tmp_path):
    first, second = drawn.draw((20, 20), (255, 0, 0)), drawn.draw((20, 20), (0, 0, 255))
    first.save(tmp_path / "really.jpg", "GIF", save_all=True, append_images=[second])
    picture = decode(ImageFolder(tmp_path).read("really.jpg"))
    with Image.open(tmp_path / "really.jpg") as gif:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(gif.convert("RGB")))


def test_palettes_with_transparency_bring_no_warning():
    picture = drawn.draw((30, 30), (1, 2, 3)).quantize(8)
    assert decode(encoded(picture, transparency=bytes(8))).mode == "RGB"  # warnings are errors


def truncated_jpeg():
    data = encoded(drawn.draw((300, 300), (200, 10, 10)), "JPEG")
    return data[: len(data) // 2]


BAD = {
    "an HTML page": b"<!DOCTYPE html><html><body>404</body></html>",
    "a truncated JPEG": truncated_jpeg(),
    "a JPEG of its header alone": truncated_jpeg()[:24],
    "a truncated PNG": encoded(drawn.draw((90, 90), (1, 2, 3)))[:-200],
    "a PNG with a wrong checksum": encoded(drawn.draw((90, 90), (1, 2, 3))).replace(b"IHDR\0\0\0Z", b"IHDR\0\0\0[", 1),
    "a truncated GIF": encoded(drawn.draw((90, 90), (1, 2, 3)), "GIF")[:100],
    "zeros": bytes(1000),
    "nothing": b"",
    "a decompression bomb": encoded(Image.new("1", (14000, 14000))),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_picture_is_never_half_decoded(kind):
    with pytest.raises(BadImage):
        decode(BAD[kind])


@pytest.mark.parametrize("kind", ["an HTML page", "nothing", "zeros", "a decompression bomb"])
def test_the_beginning_of_a_file_tells_what_it_is_not(kind):
    with pytest.raises(BadImage) as caught:
        check_header(io.BytesIO(BAD[kind]))
    assert "0x" not in str(caught.value)  # a reason must not differ from run to run


def test_the_beginning_of_a_good_file_is_good(image_set):
    images = ImageFolder(image_set.folder)
    refused = {}
    for key in image_set.keys:
        with images.open(key) as file:
            try:
                check_header(file)
            except BadImage as error:
                refused[key] = str(error)
    assert refused == {}


def test_missing_pictures_keep_their_order(image_set):
    images = ImageFolder(image_set.folder)
    assert images.missing(image_set.keys) == []
    many = [f"odd/{number}.png" for number in range(40)]  # so many that the folder is listed
    assert images.missing(["nowhere/a.png", *many, *image_set.keys, "odd"]) == ["nowhere/a.png", *many, "odd"]
    assert images.missing([f"nowhere/{number}" for number in range(40)]) == [
        f"nowhere/{number}" for number in range(40)
    ]


def test_reading_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    images = ImageFolder(tmp_path)
    with pytest.raises(BadImage, match="empty"):
        images.read("empty.jpg")
    with pytest.raises(BadImage, match="not a regular file"):
        images.read("folder.jpg")
    with pytest.raises(BadImage, match="No such file"):
        images.read("missing.jpg")


def test_the_folder_must_be_one(tmp_path):
    with pytest.raises(UserError, match="--image_folder"):
        ImageFolder(tmp_path / "nowhere")
