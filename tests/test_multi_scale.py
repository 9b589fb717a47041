"""S2 features are bit-equal to a plain statement of the published method, with complete towers of transformers."""

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor

import drawn
import tiny
from llava_twophase.errors import UserError
from llava_twophase.multi_scale import multi_scale_features, parse_scales
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower

SCALES = (56, 112, 168)
PICTURES = [drawn.draw(size, (10, 200, 90)) for size in ((300, 240), (90, 180))]


def published(model, pixels, scales):
    """The method, image by image and tile by tile: resample, encode every tile, put them together, average, join."""
    grids = []
    for scale in scales:
        resampled = interpolate(pixels, size=(scale, scale), mode="bicubic")
        rows = []
        for top in range(0, scale, scales[0]):
            tiles = [
                resampled[:, :, top : top + scales[0], left : left + scales[0]] for left in range(0, scale, scales[0])
            ]
            maps = [model(tile).transpose(1, 2).reshape(len(pixels), -1, 4, 4) for tile in tiles]
            rows.append(torch.cat(maps, dim=3))
        merged = torch.cat(rows, dim=2)  # [B, D, 4 N, 4 N]
        grids.append(interpolate(merged, size=(4, 4), mode="area"))
    return torch.cat(grids, dim=1).flatten(2).transpose(1, 2)


def large_processor(folder, side):
    """The image processor as LLaVA changes it: it resizes and crops to the largest scale."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    square = {"height": side, "width": side}
    size = {"shortest_edge": side} if processor.size.get("shortest_edge") else square
    return type(processor).from_pretrained(folder, size=size, crop_size=square)


@pytest.mark.parametrize("scales", [SCALES, (56, 168)])
@pytest.mark.parametrize(
    ("kind", "model_class", "skip"),
    [
        ("tiny_clip", "CLIPVisionModel", 1),
        ("tiny_siglip", "SiglipVisionModel", 0),
        ("tiny_dinov2", "Dinov2Model", 1),
    ],
)
def test_encode_of_several_scales_is_bit_equal_to_the_published_method(request, kind, model_class, skip, scales):
    folder = request.getfixturevalue(kind)
    tower = VisionTower(str(folder), Preprocessor(str(folder), s2_scales=scales))
    assert tower.grid == (4, 4) and tower.feature_shape == (16, 32 * len(scales))
    found = tower.encode(torch.from_numpy(np.stack([tower.preprocessor.crop(picture) for picture in PICTURES])))
    model = getattr(transformers, model_class).from_pretrained(folder, attn_implementation="eager").eval()
    pixels = large_processor(folder, scales[-1])(PICTURES, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, scales[-1], scales[-1])
    with torch.inference_mode():
        expected = published(
            lambda tile: model(pixel_values=tile, output_hidden_states=True).hidden_states[-2][:, skip:], pixels, scales
        )
    assert torch.equal(found, expected)


def test_multi_scale_features_give_a_patch_its_place():
    # A tower whose feature is the mean colour of a patch: each scale sees the same picture, so all channels agree.
    ramp = torch.arange(4.0).repeat_interleave(42)  # brightness by column, constant within a patch of every scale
    pixels = (ramp + 10 * ramp[:, None]).expand(1, 3, 168, 168)
    features = multi_scale_features(
        lambda tiles: interpolate(tiles, size=(4, 4), mode="area").flatten(2).transpose(1, 2), pixels, (56, 168)
    )
    assert features.shape == (1, 16, 6)
    assert torch.allclose(features[0, :, 3].reshape(4, 4), torch.arange(4.0) + 10 * torch.arange(4.0)[:, None])
    assert (features[0, :, 0] - features[0, :, 3]).abs().max() < 1  # resampled edges differ


def test_preprocessor_crops_at_the_largest_scale(tiny_clip):
    preprocessor = Preprocessor(str(tiny_clip), "pad", SCALES)
    assert (preprocessor.image_size, preprocessor.tile_size) == (168, 56)
    assert preprocessor.crop(PICTURES[0]).shape == (168, 168, 3)


def test_fingerprint_has_the_scales(tiny_clip):
    one = VisionTower(str(tiny_clip), Preprocessor(str(tiny_clip)))
    several = VisionTower(str(tiny_clip), Preprocessor(str(tiny_clip), s2_scales=SCALES))
    assert "s2_scales" not in one.fingerprint() and several.fingerprint()["s2_scales"] == [56, 112, 168]
    assert several.fingerprint()["processor"]["crop_size"] == {"height": 168, "width": 168}


@pytest.mark.parametrize("scales", [(56, 100), (112, 224)])
def test_preprocessor_refuses_scales_that_are_not_multiples_of_the_crop(tiny_clip, scales):
    with pytest.raises(UserError, match="takes crops of 56 px; expected 56 and multiples of it, such as 56,112,168"):
        Preprocessor(str(tiny_clip), s2_scales=scales)


def test_tower_refuses_cls_with_several_scales(tiny_clip):
    with pytest.raises(UserError, match="with --s2 True only patch is possible"):
        VisionTower(str(tiny_clip), Preprocessor(str(tiny_clip), s2_scales=SCALES), select_feature="cls_patch")


def test_parse_scales_sorts_as_llava_does():
    assert parse_scales(True, "1008,336,672") == (336, 672, 1008)
    assert parse_scales(False, "anything") == ()


@pytest.mark.parametrize("text", ["336", "336,", "336,336", "a,b", "0,336", ""])
def test_parse_scales_refuses_other_lists(text):
    with pytest.raises(UserError, match="expected two or more sizes in pixels, such as 336,672,1008"):
        parse_scales(True, text)


def test_shape_of_clip_l_336_is_that_of_llava(tmp_path):
    folder = tiny.write_clip(tmp_path, image_size=336, hidden_size=1024, num_hidden_layers=1)
    square = {"height": 336, "width": 336}
    tiny.write_preprocessor(folder, {**tiny.CLIP_PREPROCESSOR, "size": {"shortest_edge": 336}, "crop_size": square})
    tower = VisionTower(str(folder), Preprocessor(str(folder), s2_scales=(336, 672, 1008)))
    assert tower.feature_shape == (576, 3072)
