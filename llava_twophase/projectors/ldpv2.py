"""``ldpv2``: the lightweight downsample projector of MobileVLM V2 (arXiv 2402.03766).

Two point-wise convolutions with GELU between them, average pooling, and a depth-wise convolution with a shortcut, which
gives the pooled tokens positions (PEG). A point-wise convolution is a linear layer.

Shapes: B images, L patches, D tower width, f factor, H LLM width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from llava_twophase.projectors.grid import Grid, require_blocks, require_grid, to_map, to_tokens
from llava_twophase.projectors.mlp import build_mlp


class LDPv2(nn.Module):
    """Maps ``[B, L, D]`` to ``[B, L / f^2, H]``.

    Args:
        tower_width: D.
        llm_width: H.
        grid: Rows and columns of patches.
        factor: f, side of a pooled block in patches.

    Raises:
        UserError: There is no grid, or it cannot be divided into blocks.
    """

    def __init__(self, tower_width: int, llm_width: int, grid: Grid | None, factor: int = 2) -> None:
        super().__init__()
        self._grid = require_grid("ldpv2", grid)
        require_blocks("ldpv2", self._grid, factor)
        self._factor = factor
        self.pointwise = build_mlp("mlp2x_gelu", tower_width, llm_width)
        self.position = nn.Conv2d(llm_width, llm_width, kernel_size=3, padding=1, groups=llm_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project the features of some images."""
        pooled = avg_pool2d(to_map(self.pointwise(features), self._grid), self._factor)  # [B, H, rows, columns]
        return to_tokens(self.position(pooled) + pooled)
