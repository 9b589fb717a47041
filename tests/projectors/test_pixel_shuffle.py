"""PixelShuffleMLP equals a plain statement of the shuffle followed by its MLP."""

import pytest
import torch

from llava_twophase.errors import UserError
from llava_twophase.projectors.pixel_shuffle import PixelShuffleMLP


@pytest.mark.parametrize(("grid", "factor"), [((4, 4), 2), ((6, 6), 3), ((2, 4), 2), ((3, 3), 1)])
def test_pixel_shuffle_concatenates_the_channels_of_neighbouring_patches(grid, factor):
    rows, columns = grid
    projector = PixelShuffleMLP(5, 7, grid, factor=factor)
    features = torch.randn(2, rows * columns, 5)
    blocks = []
    for row in range(0, rows, factor):
        for column in range(0, columns, factor):
            inside = [(row + i) * columns + column + j for i in range(factor) for j in range(factor)]
            blocks.append(torch.cat([features[:, place] for place in inside], dim=1))
    assert torch.equal(projector(features), projector.mlp(torch.stack(blocks, dim=1)))


@pytest.mark.parametrize(("factor", "fitting"), [(2, r"\[3, 9, 27\]"), (0, ""), ("2", "")])
def test_pixel_shuffle_refuses_a_grid_that_the_factor_does_not_divide(factor, fitting):
    with pytest.raises(UserError, match=rf"27 x 27 patches cannot be divided into blocks of {factor} .*{fitting}"):
        PixelShuffleMLP(5, 7, (27, 27), factor=factor)
