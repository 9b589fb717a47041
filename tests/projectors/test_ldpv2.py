"""LDPv2 equals a plain statement of its three steps."""

import torch

from llava_twophase.projectors.ldpv2 import LDPv2


def test_ldpv2_is_an_mlp_average_pooling_and_a_residual_depthwise_convolution():
    projector = LDPv2(6, 7, (4, 4))
    features = torch.randn(2, 16, 6)
    mapped = projector.pointwise(features).unflatten(1, (2, 2, 2, 2))  # rows of blocks, rows inside, and columns alike
    pooled = mapped.mean(dim=(2, 4))  # [2, 2, 2, 7]
    padded = torch.zeros(2, 4, 4, 7)
    padded[:, 1:3, 1:3] = pooled
    kernel = projector.position.weight[:, 0]  # [7, 3, 3]
    positions = torch.zeros_like(pooled)
    for row in range(2):
        for column in range(2):
            seen = padded[:, row : row + 3, column : column + 3]  # [2, 3, 3, 7]
            positions[:, row, column] = torch.einsum("bijc,cij->bc", seen, kernel) + projector.position.bias
    torch.testing.assert_close(projector(features), (pooled + positions).flatten(1, 2))
