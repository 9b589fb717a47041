"""Joined features: concatenated on channels, with patch grids of other sizes resampled."""

import numpy as np
import pytest
import torch

from llava_twophase.errors import UserError
from llava_twophase.joining import join_features, joined_fingerprint, joined_shape, parts_of_fingerprint


def bilinear(grid, side):
    """Resample `[n, n, D]` to `[side, side, D]` in float64, from the definition: pixel centres, edges repeated."""
    size = len(grid)
    centres = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, size - 1)
    low = np.floor(centres).astype(int)
    high, weight = np.minimum(low + 1, size - 1), centres - low
    rows = grid[low] * (1 - weight)[:, None, None] + grid[high] * weight[:, None, None]
    return rows[:, low] * (1 - weight)[None, :, None] + rows[:, high] * weight[None, :, None]


def features(tokens, width, dtype=torch.float32, seed=0):
    return torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_join_features_concatenates_channels_in_order():
    parts = [features(9, 4), features(9, 3, seed=1), features(9, 2, seed=2)]
    joined = join_features(parts)
    assert joined.shape == (2, 9, 9) == (2, *joined_shape([(9, 4), (9, 3), (9, 2)], ["a", "b", "c"], False))
    assert torch.equal(joined[..., :4], parts[0]) and torch.equal(joined[..., 4:7], parts[1])
    assert torch.equal(joined[..., 7:], parts[2])


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
    ],
)
def test_join_features_holds_every_part_exactly(dtypes, expected):
    parts = [features(4, 3, dtype, seed) for seed, dtype in enumerate(dtypes)]
    joined = join_features(parts)
    assert joined.dtype == expected
    assert torch.equal(joined.float(), torch.cat([part.float() for part in parts], dim=2))


@pytest.mark.parametrize(("side", "other"), [(4, 2), (2, 4), (3, 5), (24, 27)])
def test_join_features_resamples_other_grids_bilinearly_to_the_first(side, other):
    first, second = features(side**2, 2), features(other**2, 3, torch.bfloat16, seed=1)
    joined = join_features([first, second])
    assert joined.dtype == torch.float32 and torch.equal(joined[..., :2], first)
    for image in range(2):
        grid = second[image].double().numpy().reshape(other, other, 3)
        found = joined[image, :, 2:].numpy().reshape(side, side, 3)
        np.testing.assert_allclose(found, bilinear(grid, side), atol=1e-5)


def test_joined_shape_refuses_other_token_counts_and_names_the_flag():
    with pytest.raises(UserError, match=r"a has 576 tokens per image, b has 729; .*--interpolate_patch_grid True"):
        joined_shape([(576, 8), (729, 8)], ["a", "b"], interpolate=False)
    assert joined_shape([(576, 8), (729, 4)], ["a", "b"], interpolate=True) == (576, 12)


@pytest.mark.parametrize(("shapes", "count"), [([(577, 8), (576, 8)], 577), ([(576, 8), (257, 8)], 257)])
def test_joined_shape_refuses_to_resample_what_is_not_a_square_grid(shapes, count):
    with pytest.raises(UserError, match=f"{count} tokens are not one: use --mm_vision_select_feature patch"):
        joined_shape(shapes, ["a", "b"], interpolate=True)


def test_parts_of_fingerprint_inverts_joined_fingerprint():
    parts = [{"tower": str(number)} for number in range(12)]  # more than one digit: not in the order of their names
    assert parts_of_fingerprint(joined_fingerprint(parts, interpolate=True)) == parts
    assert parts_of_fingerprint({"tower": "one", "joined": 3}) == [{"tower": "one", "joined": 3}]
