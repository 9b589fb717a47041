"""The grid of patches that a row of tokens comes from."""

import pytest
import torch

from llava_twophase.projectors.grid import square_grid, to_map, to_tokens


@pytest.mark.parametrize(("patches", "grid"), [(576, (24, 24)), (577, None), (1, (1, 1)), (729, (27, 27)), (2, None)])
def test_square_grid_of_tokens(patches, grid):
    assert square_grid(patches) == grid


def test_to_map_puts_patches_in_rows_from_the_top_left_and_to_tokens_takes_them_back():
    tokens = torch.randn(2, 12, 5)
    found = to_map(tokens, (3, 4))
    assert found.shape == (2, 5, 3, 4) and torch.equal(found[:, :, 1, 2], tokens[:, 6])
    assert torch.equal(to_tokens(found), tokens)
