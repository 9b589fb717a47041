"""The patch grid that the tokens of an image form."""

import pytest

from llava_twophase.patch_grid import grid_shape


@pytest.mark.parametrize(
    ("tokens", "feature", "grid"),
    [
        (576, "patch", (24, 24)),
        (577, "cls_patch", (24, 24)),
        (729, "cls_patch", (27, 27)),  # no CLS in the tower
        (577, "patch", None),
        (577, None, (24, 24)),
        (0, "patch", None),
    ],
)
def test_grid_shape_of_features(tokens, feature, grid):
    assert grid_shape(tokens, feature) == grid
