"""Regions of resized images, bit-equal to Pillow's resize followed by a crop."""

import numpy as np
import pytest
from PIL import Image

from llava_twophase.vision.resize import (
    Canvas,
    Region,
    center_region,
    is_supported,
    resize_region,
    shortest_edge_size,
)

SHAPES = [(1, 1), (1, 40), (400, 1), (3, 100), (90, 2), (7, 7), (61, 83), (300, 17), (40, 399), (523, 522)]


def noise(width, height):
    """Black and white noise overshoots, so clipping to 0 and 255 is covered too."""
    rng = np.random.default_rng(width * 1000 + height)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    return np.where(rng.random((height, width, 1)) < 0.5, image, 255 * (image > 127)).astype(np.uint8)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [14, 56, 336])
def test_resize_region_of_a_padded_image_is_pillows(shape, side, resample):
    image, longest = noise(*shape), max(shape)
    canvas = Canvas(longest, longest, (longest - shape[0]) // 2, (longest - shape[1]) // 2, (122, 116, 104))
    padded = Image.new("RGB", (longest, longest), canvas.color)
    padded.paste(Image.fromarray(image), (canvas.left, canvas.top))
    wanted = np.asarray(padded.resize((side, side), resample))
    found = resize_region(image, canvas, (side, side), Region(0, 0, side, side), resample)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if min(shape) < 56])
def test_resize_region_of_an_enlarged_image_is_pillows(shape, resample):
    image, size = noise(*shape), shortest_edge_size(*shape, 56)
    region = center_region(size, (56, 56))
    wanted = np.asarray(Image.fromarray(image).resize(size, resample))
    wanted = wanted[region.top : region.top + 56, region.left : region.left + 56]
    np.testing.assert_array_equal(resize_region(image, Canvas(*shape), size, region, resample), wanted)


def test_resize_region_of_every_part_is_pillows():
    image, size = noise(30, 4), (300, 40)
    wanted = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    for left, top in ((0, 0), (290, 0), (0, 30), (290, 30), (133, 17)):
        found = resize_region(image, Canvas(30, 4), size, Region(left, top, 10, 10), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found, wanted[top : top + 10, left : left + 10])


def test_center_region_refuses_an_image_smaller_than_the_crop():
    assert center_region((56, 55), (56, 56)) is None
    assert center_region((61, 56), (56, 56)) == Region(2, 0, 56, 56)


def test_is_supported_refuses_other_filters():
    assert is_supported(2) and is_supported(3)
    assert not is_supported(0) and not is_supported(1) and not is_supported(77)
