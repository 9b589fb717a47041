"""Images decoded as LLaVA decodes them, and files that are not images."""

import io

import numpy as np
import pytest
from PIL import Image

import drawn
from llava_twophase.vision import images as images_module
from llava_twophase.vision.images import FORMATS, BadImage, check_header, decode, decode_image
from llava_twophase.vision.sources import ImageFolder


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_decode_equals_convert_rgb(image_set):
    images = ImageFolder(image_set.folder)
    for key in image_set.keys:
        with Image.open(image_set.folder / key) as picture:
            wanted = np.asarray(picture.convert("RGB"))
        found = decode(images.read(key))
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), wanted, err_msg=key)


def test_decode_drops_alpha(image_set):
    picture = decode((image_set.folder / "odd/transparent.png").read_bytes())
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(drawn.transparent())[..., :3])


def test_decode_ignores_exif_orientation(image_set):
    assert decode((image_set.folder / "odd/turned.jpg").read_bytes()).size == (96, 60)


def drawn_ramp():
    return np.add.outer(4 * np.arange(60), 4 * np.arange(60))


def test_decode_clips_sixteen_bits(image_set):
    values = np.asarray(decode((image_set.folder / "odd/sixteen_bit.png").read_bytes()))
    assert (values.astype(int) == np.minimum(drawn_ramp(), 255)[..., None]).all()


def test_decode_goes_by_content_not_by_name(tmp_path):
    first, second = drawn.draw((20, 20), (255, 0, 0)), drawn.draw((20, 20), (0, 0, 255))
    first.save(tmp_path / "really.jpg", "GIF", save_all=True, append_images=[second])
    picture = decode(ImageFolder(tmp_path).read("really.jpg"))
    with Image.open(tmp_path / "really.jpg") as gif:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(gif.convert("RGB")))


def test_decode_of_a_transparent_palette_gives_no_warning():
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
def test_decode_refuses_damaged_files(kind):
    with pytest.raises(BadImage):
        decode(BAD[kind])


@pytest.mark.parametrize("kind", ["an HTML page", "nothing", "zeros", "a decompression bomb"])
def test_check_header_refuses_other_files(kind):
    with pytest.raises(BadImage) as caught:
        check_header(io.BytesIO(BAD[kind]))
    assert "0x" not in str(caught.value)  # a reason must be the same in every run


def test_check_header_accepts_every_image(image_set):
    images = ImageFolder(image_set.folder)
    refused = {}
    for key in image_set.keys:
        with images.open(key) as file:
            try:
                check_header(file)
            except BadImage as error:
                refused[key] = str(error)
    assert refused == {}


def test_check_header_leaves_the_file_open(image_set):
    with ImageFolder(image_set.folder).open(image_set.keys[0]) as file:
        check_header(file)
        file.seek(0)
        assert file.read() == (image_set.folder / image_set.keys[0]).read_bytes()


def test_decode_image_reports_clipped_values(image_set):
    clipped = {key for key in image_set.keys if decode_image((image_set.folder / key).read_bytes()).high_bit_depth}
    assert clipped == {"odd/sixteen_bit.png"}


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("ICO",)])
def test_decode_accepts_every_format(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    data = encoded(drawn.draw((40, 30), (200, 20, 30)), kind)
    with Image.open(io.BytesIO(data)) as picture:
        np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(picture.convert("RGB")))
    check_header(io.BytesIO(data))


def test_decode_accepts_multi_picture_jpeg():
    frames = [drawn.draw((40, 30), colour) for colour in ((200, 20, 30), (20, 30, 200))]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((18, 13))[0] > 150


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "SGI", "PDF"])
def test_decode_refuses_formats_that_are_not_listed(kind, monkeypatch):
    """No plugin of another format sees the file: that of EPS would look for Ghostscript and run it."""
    data = encoded(drawn.draw((40, 30), (200, 20, 30)), kind)
    Image.init()
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: pytest.fail("looks for Ghostscript"))
    for call in (decode, lambda data: check_header(io.BytesIO(data))):
        with pytest.raises(BadImage, match="it is a.? ?P|it is not an image, or its header is damaged"):
            call(data)


def test_decode_reports_memory_errors(monkeypatch):
    class Huge:
        mode = "RGB"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def convert(self, mode):
            raise MemoryError

    monkeypatch.setattr(images_module.Image, "open", lambda *_, **__: Huge())
    with pytest.raises(BadImage, match="cannot be decoded: out of memory"):
        decode(b"x")
