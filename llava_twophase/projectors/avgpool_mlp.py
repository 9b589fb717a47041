"""``avgpool_mlp``: 2D average pooling and LLaVA's two-layer MLP, as in DeCo (arXiv 2405.20985).

DeCo's finding is that a projector need not select semantics: pooling the patches and leaving that to the LLM does as
well as learned queries.

Shapes: B images, L patches, D tower width, T tokens, H LLM width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from llava_twophase.projectors.grid import Grid, pooled_grid, require_grid, to_map, to_tokens
from llava_twophase.projectors.mlp import build_mlp


class AvgPoolMLP(nn.Module):
    """Maps ``[B, L, D]`` to ``[B, T, H]``.

    Args:
        tower_width: D.
        llm_width: H.
        grid: Rows and columns of patches.
        tokens: T, a square number; by default, half as many rows and columns as patches: 144 for 576.

    Raises:
        UserError: There is no grid, or it cannot be pooled to this number of tokens.
    """

    def __init__(self, tower_width: int, llm_width: int, grid: Grid | None, tokens: int | None = None) -> None:
        super().__init__()
        self._grid = require_grid("avgpool_mlp", grid)
        self._pooled = pooled_grid("avgpool_mlp", self._grid, tokens)
        self.mlp = build_mlp("mlp2x_gelu", tower_width, llm_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project the features of some images."""
        pooled = adaptive_avg_pool2d(to_map(features, self._grid), self._pooled)
        projected: torch.Tensor = self.mlp(to_tokens(pooled))
        return projected
