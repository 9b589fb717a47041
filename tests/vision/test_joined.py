"""Towers that run as one: each with its own image processor, joined as caches are."""

import pytest
import torch

import tiny
from encoded import encode_images, load_tower
from llava_twophase.errors import UserError
from llava_twophase.joining import join_features
from llava_twophase.vision.joined import JoinedTowers


@pytest.fixture(scope="module")
def coarse_clip(tmp_path_factory):
    """A CLIP tower of 4 patches of crops of another size, width 48."""
    folder = tmp_path_factory.mktemp("coarse")
    tiny.write_clip(folder, seed=7, image_size=60, patch_size=30, hidden_size=48)
    size = {"crop_size": {"height": 60, "width": 60}, "size": {"shortest_edge": 60}}
    return tiny.write_preprocessor(folder, {**tiny.CLIP_PREPROCESSOR, **size})


def test_joined_towers_give_the_features_of_each_tower(plain_set, tiny_clip, tiny_siglip, tiny_dinov2):
    towers = [load_tower(folder) for folder in (tiny_siglip, tiny_dinov2, tiny_clip)]
    joined = JoinedTowers(towers)
    keys = plain_set.keys[:3]
    found = encode_images(joined, plain_set.folder, keys)
    assert found.shape == (3, 16, 96) == (3, *joined.feature_shape)
    assert torch.equal(found, torch.cat([encode_images(tower, plain_set.folder, keys) for tower in towers], dim=2))


def test_joined_towers_with_other_crops_and_grids_are_interpolated(plain_set, tiny_clip, coarse_clip):
    towers = [load_tower(tiny_clip), load_tower(coarse_clip)]
    with pytest.raises(UserError, match=f"--vision_tower {tiny_clip} has 16 tokens per image, .* has 4"):
        JoinedTowers(towers)
    joined, keys = JoinedTowers(towers, interpolate=True), plain_set.keys[:3]
    found = encode_images(joined, plain_set.folder, keys)
    assert found.shape == (3, 16, 80)
    assert torch.equal(found, join_features([encode_images(tower, plain_set.folder, keys) for tower in towers]))


def test_joined_towers_keep_their_own_settings(plain_set, tiny_clip, tiny_siglip):
    towers = [load_tower(tiny_clip, select_layer=-1), load_tower(tiny_siglip, select_layer=-3, dtype=torch.bfloat16)]
    joined, keys = JoinedTowers(towers), plain_set.keys[:2]
    found = encode_images(joined, plain_set.folder, keys)
    assert torch.equal(found, join_features([encode_images(tower, plain_set.folder, keys) for tower in towers]))
    parts = joined.fingerprint()["joined"]
    assert [parts[name]["select_layer"] for name in ("1", "2")] == [-1, -3]
    assert [parts[name]["compute_dtype"] for name in ("1", "2")] == ["float32", "bfloat16"]
    assert parts["1"] == towers[0].fingerprint()
