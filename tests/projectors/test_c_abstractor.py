"""CAbstractor: tokens, locality, and its residual block."""

import pytest
import torch
from torch.nn.functional import silu

from llava_twophase.projectors.c_abstractor import CAbstractor


@pytest.mark.parametrize(("side", "tokens", "expected"), [(4, None, 4), (5, None, 9), (6, 9, 9), (3, 1, 1)])
def test_c_abstractor_gives_a_square_number_of_tokens(side, tokens, expected):
    projector = CAbstractor(6, 7, (side, side), tokens=tokens, hidden=8, depth=1)
    assert projector(torch.randn(2, side * side, 6)).shape == (2, expected, 7)


def test_c_abstractor_without_blocks_is_pooling_and_its_readout():
    projector = CAbstractor(6, 7, (4, 4), depth=0)
    features = torch.randn(2, 16, 6)
    pooled = features.unflatten(1, (2, 2, 2, 2)).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(projector(features), projector.readout(pooled))


def test_block_adds_its_shortcut_to_excited_neighbours():
    block = CAbstractor(6, 7, (4, 4), hidden=8).before[0]
    features = torch.randn(2, 6, 4, 4)
    hidden = block.neighbours(block.enter(features))
    squeezed = hidden.mean(dim=(2, 3), keepdim=True)
    gates = block.excite[3](silu(block.excite[1](squeezed))).sigmoid()
    torch.testing.assert_close(block(features), silu(block.leave(hidden * gates) + block.shortcut(features)))
    normed = block.enter[1](features.new_tensor(range(8)).view(1, 8, 1, 1))
    torch.testing.assert_close(normed.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_later_blocks_have_an_identity_shortcut():
    assert not list(CAbstractor(6, 7, (4, 4), hidden=8).before[1].shortcut.parameters())
