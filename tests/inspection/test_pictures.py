"""Features as colours, the crop that the tower saw, and the sheet of panels."""

import numpy as np
import pytest
from PIL import Image

from cache.make import FINGERPRINT
from llava_twophase.errors import UserError
from llava_twophase.inspection import pictures


@pytest.mark.parametrize(
    ("tokens", "select_feature", "side"),
    [(9, "patch", 3), (10, "cls_patch", 3), (9, "cls_patch", 3), (10, None, 3), (9, None, 3)],
)
def test_patch_grid_drops_the_cls_token(tokens, select_feature, side):
    features = np.arange(tokens * 2, dtype=np.float32).reshape(tokens, 2)
    grid = pictures.patch_grid(features, select_feature)
    assert grid.shape == (side, side, 2)
    np.testing.assert_array_equal(grid.reshape(-1, 2), features[tokens - side * side :])


def test_patch_grid_refuses_tokens_that_form_no_square():
    with pytest.raises(UserError, match="10 tokens form no square"):
        pictures.patch_grid(np.zeros((10, 2), np.float32), "patch")


def test_pca_colours_are_equal_for_equal_patches_only():
    features = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    grid = features[np.arange(16).reshape(4, 4) % 4]
    colours = pictures.pca_colours(grid)
    assert len({tuple(colours[0, column]) for column in range(4)}) == 4
    assert all((colours[row] == colours[0]).all() for row in range(4))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_constant_and_narrow_features_have_colours(width):
    grid = np.ones((3, 3, width), np.float32)
    assert pictures.pca_colours(grid).shape == (3, 3, 3)
    assert (pictures.norm_colours(np.linalg.norm(grid, axis=-1)) == (0, 32, 77)).all()


def test_norm_colours_go_from_dark_to_bright():
    colours = pictures.norm_colours(np.arange(9, dtype=np.float32).reshape(3, 3)).astype(int).sum(axis=-1).ravel()
    assert (np.diff(colours) > 0).all()


def test_crop_pads_as_the_tower_saw_it():
    picture = Image.new("RGB", (80, 40), (220, 30, 30))
    padded = pictures.crop(picture, {**FINGERPRINT, "image_aspect_ratio": "pad"}, 64)
    assert padded.getpixel((32, 4)) == padded.getpixel((32, 60)) == (127, 127, 127)
    assert padded.getpixel((2, 32)) == (220, 30, 30)


def test_crop_drops_the_border_that_the_processor_drops():
    picture = Image.new("RGB", (100, 100), "white")
    picture.paste("red", (25, 25, 75, 75))
    made = {"processor": {"size": {"shortest_edge": 60}, "crop_size": {"height": 30, "width": 30}}}
    assert pictures.crop(picture, made, 50).getpixel((3, 3)) == (255, 0, 0)
    assert pictures.crop(picture, {}, 50).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 3)])
@pytest.mark.parametrize("ratio", ["square", "pad"])
def test_crop_of_odd_sizes(size, ratio):
    picture = Image.new("RGB", size, "red")
    assert pictures.crop(picture, {**FINGERPRINT, "image_aspect_ratio": ratio}, 48).size == (48, 48)


def test_draw_maps_refuses_features_that_are_not_finite():
    with pytest.raises(UserError, match="not finite"):
        pictures.draw_maps(np.full((1, 9, 4), np.nan, np.float32), {})


def test_draw_maps_uses_one_basis_and_one_scale():
    features = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    features[1, :8] = features[0, :8]
    maps = pictures.draw_maps(features, {})
    np.testing.assert_array_equal(maps.pca[0].reshape(16, 3)[:8], maps.pca[1].reshape(16, 3)[:8])
    np.testing.assert_array_equal(maps.norms[0].reshape(16, 3)[:8], maps.norms[1].reshape(16, 3)[:8])


def test_similarity_is_largest_at_the_chosen_patch():
    features = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    maps = pictures.draw_maps(features, {}, (2, 1))
    brightness = maps.similarity.astype(int).sum(-1)
    assert brightness[0, 2, 1] == brightness.max() == sum((255, 234, 70))
    assert -1 <= maps.similarity_range[0] < maps.similarity_range[1] < 1


@pytest.mark.parametrize("patch", [(4, 0), (0, 4), (-1, 0)])
def test_draw_maps_refuses_a_patch_outside_the_grid(patch):
    with pytest.raises(UserError, match="outside the grid of 4 x 4"):
        pictures.draw_maps(np.ones((1, 16, 8), np.float32), {}, patch)
