"""Crops and pixel values, bit-equal to the Hugging Face Pillow processor as LLaVA calls it; bounded memory."""

import json
import resource
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

import drawn
import tiny
from llava_twophase.errors import UserError
from llava_twophase.vision import preprocess
from llava_twophase.vision.images import BadImage, decode
from llava_twophase.vision.preprocess import Preprocessor

TOWERS = ["tiny_clip", "tiny_siglip", "tiny_dinov2"]


@pytest.fixture(params=TOWERS)
def tower(request):
    return request.getfixturevalue(request.param)


def expected(processor, picture, pad):
    """LLaVA's pixel values of an image; the channel order is given, because transformers guesses it wrong."""
    if pad and picture.width != picture.height:
        side = max(picture.size)
        canvas = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in processor.image_mean))
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = canvas
    return processor(np.asarray(picture), input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("ratio", ["square", "pad"])
def test_pixel_values_equal_the_processors(image_set, tower, ratio):
    ours, theirs = Preprocessor(tower, ratio), AutoImageProcessor.from_pretrained(tower, backend="pil")
    pictures = [decode((image_set.folder / key).read_bytes()) for key in image_set.keys]
    crops = torch.from_numpy(np.stack([ours.crop(picture) for picture in pictures]))
    assert crops.dtype == torch.uint8 and crops.shape[1:] == (ours.image_size, ours.image_size, 3)
    wanted = torch.stack([expected(theirs, picture, ratio == "pad") for picture in pictures])
    found = ours.pixel_values(crops)
    assert torch.equal(found, wanted)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(ours.pixel_values(crops, dtype), wanted.to(dtype))


@pytest.mark.parametrize("size", [(56, 56), (64, 80), (1, 1), (3, 3), (200, 3), (3, 200), (1, 90), (90, 1), (500, 20)])
@pytest.mark.parametrize("ratio", ["square", "pad"])
def test_crop_equals_the_processors_for_any_size(tower, size, ratio):
    picture = drawn.draw(size, (10, 200, 90))
    ours, theirs = Preprocessor(tower, ratio), AutoImageProcessor.from_pretrained(tower, backend="pil")
    found = ours.pixel_values(torch.from_numpy(ours.crop(picture))[None])[0]
    assert torch.equal(found, expected(theirs, picture, ratio == "pad"))


def test_pixel_values_equal_the_processors_without_channel_order(tower):
    # If transformers guesses the channel order right, giving it changes nothing.
    picture = drawn.draw((64, 80), (10, 200, 90))
    ours, theirs = Preprocessor(tower), AutoImageProcessor.from_pretrained(tower, backend="pil")
    found = ours.pixel_values(torch.from_numpy(ours.crop(picture))[None])
    assert torch.equal(found, theirs(picture, return_tensors="pt")["pixel_values"])


def test_crop_pads_clip_with_llavas_color(tiny_clip):
    crop = Preprocessor(tiny_clip, "pad").crop(Image.new("RGB", (200, 10)))
    assert crop[0, 0].tolist() == [122, 116, 104]


def test_pixel_values_of_all_256_values_of_each_channel(tower):
    ours, theirs = Preprocessor(tower), AutoImageProcessor.from_pretrained(tower, backend="pil")
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    found = ours.pixel_values(torch.from_numpy(ramp)[None])[0]
    options = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_last"}
    assert torch.equal(found, theirs(ramp, return_tensors="pt", **options)["pixel_values"][0])


def test_settings_hold_the_mean(tiny_clip, tmp_path):
    before = Preprocessor(tiny_clip).settings()
    assert json.dumps(before)
    changed = shutil.copytree(tiny_clip, tmp_path / "changed")
    tiny.write_preprocessor(changed, {**tiny.CLIP_PREPROCESSOR, "image_mean": [0.5, 0.5, 0.5]})
    assert Preprocessor(changed).settings() != before


def test_preprocessor_refuses_an_unknown_ratio(tiny_clip):
    with pytest.raises(UserError, match="square, pad"):
        Preprocessor(tiny_clip, "anyres")


def test_preprocessor_refuses_a_folder_without_processor(tmp_path):
    with pytest.raises(UserError, match="no image processor"):
        Preprocessor(tmp_path)


def test_preprocessor_refuses_crops_that_are_not_squares(tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "tower")
    tiny.write_preprocessor(folder, {**tiny.CLIP_PREPROCESSOR, "crop_size": {"height": 56, "width": 42}})
    with pytest.raises(UserError, match="not squares"):
        Preprocessor(folder)


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (2000, 3), (2, 2000), (500, 20)])
@pytest.mark.parametrize("ratio", ["square", "pad"])
def test_crop_of_a_thin_image_equals_the_processors(tower, size, ratio, monkeypatch):
    """With a limit of one pixel, every image that resizing or padding enlarges takes the way of thin ones."""
    ours, theirs = Preprocessor(tower, ratio), AutoImageProcessor.from_pretrained(tower, backend="pil")
    picture = drawn.draw(size, (10, 200, 90))
    monkeypatch.setattr(preprocess, "_MAX_PIXELS", 1)
    processed, process = [], ours._process
    monkeypatch.setattr(ours, "_process", lambda image: processed.append(image) or process(image))
    found = ours.pixel_values(torch.from_numpy(ours.crop(picture))[None])[0]
    assert torch.equal(found, expected(theirs, picture, ratio == "pad"))
    # SigLIP without padding resizes to one small size, so Pillow's own resize needs little memory.
    assert bool(processed) == ("siglip" in str(tower) and ratio == "square")


@pytest.fixture
def limited_memory():
    """Give this process at most 1 GB more than it has; without the limit, a thin image would take all memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("size", [(3000, 1), (20000, 1), (1, 40000), (100000, 2)])
@pytest.mark.parametrize("ratio", ["square", "pad"])
def test_crop_of_a_thin_image_needs_little_memory(tmp_path, size, ratio, limited_memory):
    side = {"height": 336, "width": 336}
    settings = {**tiny.CLIP_PREPROCESSOR, "size": {"shortest_edge": 336}, "crop_size": side}
    ours = Preprocessor(str(tiny.write_preprocessor(tmp_path, settings)), ratio)
    crop = ours.crop(Image.new("RGB", size, (200, 100, 50)))
    assert crop[168, 168].tolist() == [200, 100, 50] or ratio == "pad"
    assert crop[0, 0].tolist() == ([200, 100, 50] if ratio == "square" else [122, 116, 104])


@pytest.mark.parametrize("ratio", ["square", "pad"])
def test_crop_refuses_an_image_of_extreme_length(tiny_clip, ratio):
    with pytest.raises(BadImage, match="cannot be resized: it is too long and thin .2000000 x 1 pixels"):
        Preprocessor(tiny_clip, ratio).crop(Image.new("RGB", (2_000_000, 1)))


def test_crop_reports_errors_as_bad_images(tiny_clip, monkeypatch):
    ours = Preprocessor(tiny_clip)
    for error, message in (
        (MemoryError(), "out of memory with 4 x 3 pixels"),
        (ValueError("odd"), "odd .4 x 3 pixels"),
    ):

        def fail(image, error=error):
            raise error

        monkeypatch.setattr(ours, "_process", fail)
        with pytest.raises(BadImage, match=f"cannot be resized: {message}"):
            ours.crop(Image.new("RGB", (4, 3)))
