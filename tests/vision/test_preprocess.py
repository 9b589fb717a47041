"""Crops and pixel values, bit-equal to the Hugging Face Pillow processor as LLaVA calls it."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

import drawn
import tiny
from llava_twophase.errors import UserError
from llava_twophase.vision.images import decode
from llava_twophase.vision.preprocess import Preprocessor

TOWERS = ["tiny_clip", "tiny_siglip", "tiny_dinov2"]


@pytest.fixture(params=TOWERS)
def tower(request):
    return request.getfixturevalue(request.param)


def expected(processor, picture, pad):
    """What LLaVA's data loader makes of a picture; the channel order is said, since transformers guesses it wrong."""
    if pad and picture.width != picture.height:
        side = max(picture.size)
        canvas = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in processor.image_mean))
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = canvas
    return processor(np.asarray(picture), input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("ratio", ["square", "pad"])
def test_pixel_values_are_the_processors(image_set, tower, ratio):
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
def test_any_size(tower, size, ratio):
    picture = drawn.draw(size, (10, 200, 90))
    ours, theirs = Preprocessor(tower, ratio), AutoImageProcessor.from_pretrained(tower, backend="pil")
    found = ours.pixel_values(torch.from_numpy(ours.crop(picture))[None])[0]
    assert torch.equal(found, expected(theirs, picture, ratio == "pad"))


def test_a_picture_is_passed_as_llava_passes_it(tower):
    # Where transformers guesses the channel order right, saying it changes nothing.
    picture = drawn.draw((64, 80), (10, 200, 90))
    ours, theirs = Preprocessor(tower), AutoImageProcessor.from_pretrained(tower, backend="pil")
    found = ours.pixel_values(torch.from_numpy(ours.crop(picture))[None])
    assert torch.equal(found, theirs(picture, return_tensors="pt")["pixel_values"])


def test_clip_pads_with_llavas_colour(tiny_clip):
    crop = Preprocessor(tiny_clip, "pad").crop(Image.new("RGB", (200, 10)))
    assert crop[0, 0].tolist() == [122, 116, 104]


def test_all_256_values_of_each_channel(tower):
    ours, theirs = Preprocessor(tower), AutoImageProcessor.from_pretrained(tower, backend="pil")
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    found = ours.pixel_values(torch.from_numpy(ramp)[None])[0]
    options = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_last"}
    assert torch.equal(found, theirs(ramp, return_tensors="pt", **options)["pixel_values"][0])


def test_settings_hold_all_that_changes_a_pixel(tiny_clip, tmp_path):
    before = Preprocessor(tiny_clip).settings()
    assert json.dumps(before)
    changed = shutil.copytree(tiny_clip, tmp_path / "changed")
    tiny.write_preprocessor(changed, {**tiny.CLIP_PREPROCESSOR, "image_mean": [0.5, 0.5, 0.5]})
    assert Preprocessor(changed).settings() != before


def test_an_unknown_ratio_names_the_choices(tiny_clip):
    with pytest.raises(UserError, match="square, pad"):
        Preprocessor(tiny_clip, "anyres")


def test_a_tower_without_processor(tmp_path):
    with pytest.raises(UserError, match="no image processor"):
        Preprocessor(tmp_path)


def test_a_processor_that_makes_no_squares(tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "tower")
    tiny.write_preprocessor(folder, {**tiny.CLIP_PREPROCESSOR, "crop_size": {"height": 56, "width": 42}})
    with pytest.raises(UserError, match="not squares"):
        Preprocessor(folder)
