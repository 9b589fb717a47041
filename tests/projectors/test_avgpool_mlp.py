"""AvgPoolMLP equals a plain mean over windows followed by LLaVA's MLP."""

import pytest
import torch

from llava_twophase.errors import UserError
from llava_twophase.projectors.avgpool_mlp import AvgPoolMLP


def window(place, patches, tokens):
    """Return the patches of one axis that a token averages."""
    return range(place * patches // tokens, -(-(place + 1) * patches // tokens))


@pytest.mark.parametrize(("side", "tokens", "pooled"), [(4, None, 2), (5, None, 3), (6, 9, 3), (5, 4, 2), (3, 9, 3)])
def test_avgpool_mlp_averages_windows_of_patches(side, tokens, pooled):
    projector = AvgPoolMLP(6, 7, (side, side), tokens=tokens)
    features = torch.randn(2, side * side, 6)
    means = []
    for row in range(pooled):
        for column in range(pooled):
            rows, columns = window(row, side, pooled), window(column, side, pooled)
            means.append(features[:, [i * side + j for i in rows for j in columns]].mean(dim=1))
    torch.testing.assert_close(projector(features), projector.mlp(torch.stack(means, dim=1)))


@pytest.mark.parametrize("tokens", [5, 0, -4, 25, "4"])
def test_avgpool_mlp_refuses_a_number_of_tokens_that_is_not_a_smaller_square(tokens):
    with pytest.raises(UserError, match=rf'"tokens": {tokens}.*square number of tokens from 1 to the 16 patches'):
        AvgPoolMLP(6, 7, (4, 4), tokens=tokens)
