"""``pixel_shuffle``: blocks of patches become one token, as in InternVL 1.5 (arXiv 2404.16821).

The channels of ``factor * factor`` neighbouring patches are concatenated, so nothing is lost before the MLP; with
factor 2, a quarter of the tokens remains.

Shapes: B images, L patches, D tower width, f factor, H LLM width.
"""

from __future__ import annotations

import torch
from torch import nn

from llava_twophase.projectors.grid import Grid, require_blocks, require_grid


class PixelShuffleMLP(nn.Module):
    """Maps ``[B, L, D]`` to ``[B, L / f^2, H]``.

    Args:
        tower_width: D.
        llm_width: H.
        grid: Rows and columns of patches.
        factor: f, side of a block in patches.

    Raises:
        UserError: There is no grid, or it cannot be divided into blocks.
    """

    def __init__(self, tower_width: int, llm_width: int, grid: Grid | None, factor: int = 2) -> None:
        super().__init__()
        self._blocks = require_blocks("pixel_shuffle", require_grid("pixel_shuffle", grid), factor)
        self._factor = factor
        width = tower_width * factor * factor
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project the features of some images."""
        rows, columns = self._blocks
        blocks = features.unflatten(1, (rows, self._factor, columns, self._factor))  # [B, rows, f, columns, f, D]
        shuffled = blocks.transpose(2, 3).flatten(3).flatten(1, 2)  # [B, rows * columns, f * f * D]
        projected: torch.Tensor = self.mlp(shuffled)
        return projected
