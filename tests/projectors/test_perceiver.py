"""PerceiverResampler: a plain statement of a layer, its positions, and its refusals."""

import pytest
import torch

from llava_twophase.errors import UserError
from llava_twophase.projectors.perceiver import PerceiverResampler, sine_positions


def test_perceiver_queries_attend_to_patches_and_queries():
    projector = PerceiverResampler(8, 12, None, queries=3, depth=1, heads=2, head_width=5)
    layer, features = projector.layers[0], torch.randn(1, 9, 8)
    latents = projector.queries[None]
    queries, patches = layer.norm_latents(latents), layer.norm_features(features)
    read = torch.cat([patches, queries], dim=1)
    mixed = []
    for head in range(2):
        part = slice(5 * head, 5 * head + 5)
        query, key, value = (
            f(t)[0, :, part] for f, t in zip((layer.query, layer.key, layer.value), (queries, read, read), strict=True)
        )
        mixed.append((query @ key.T / 5**0.5).softmax(dim=1) @ value)
    latents = latents + layer.out(torch.cat(mixed, dim=1))[None]
    latents = latents + layer.feed_forward(latents)
    torch.testing.assert_close(projector(features), projector.project(projector.norm(latents)))


def test_perceiver_with_positions_sees_the_order_of_patches_and_without_does_not():
    features, order = torch.randn(1, 16, 8), torch.randperm(16)
    for positions in (False, True):
        projector = PerceiverResampler(8, 12, (4, 4), queries=3, depth=1, positions=positions)
        same = torch.allclose(projector(features), projector(features[:, order]), atol=1e-6)
        assert same is not positions
        assert "positions" not in projector.state_dict()


def test_sine_positions_are_different_for_every_patch():
    table = sine_positions((4, 3), 8)
    assert table.shape == (12, 8) and len({tuple(row.tolist()) for row in table}) == 12
    torch.testing.assert_close(table[4, :2], torch.tensor([1.0, 0.01]).sin())  # row 1, column 1
    torch.testing.assert_close(table[5, 6:], torch.tensor([2.0, 0.02]).cos())  # row 1, column 2


def test_perceiver_refuses_numbers_below_one_and_widths_without_four_parts():
    with pytest.raises(UserError, match="at least 1; found 0, 6, 8 and 64"):
        PerceiverResampler(8, 12, None, queries=0)
    with pytest.raises(UserError, match="multiple of 4, not 6"):
        PerceiverResampler(6, 12, (4, 4), positions=True)
