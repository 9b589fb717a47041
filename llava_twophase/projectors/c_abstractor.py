"""``c_abstractor``: Honeybee's convolutional abstractor (arXiv 2312.06742).

Residual blocks, adaptive average pooling to a square number of tokens, and residual blocks again keep the neighbourhood
of patches, which learned queries lose. The blocks are RegNet's (arXiv 2003.13678): 1x1, depth-wise 3x3,
squeeze-and-excitation and 1x1, with LayerNorm over the channels and SiLU. A two-layer MLP maps to the LLM's width.

Shapes: B images, L patches, D tower width, C hidden width, T tokens, H LLM width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, silu

from llava_twophase.projectors.grid import Grid, pooled_grid, require_grid, to_map, to_tokens

_SQUEEZE = 4


class CAbstractor(nn.Module):
    """Maps ``[B, L, D]`` to ``[B, T, H]``.

    Args:
        tower_width: D.
        llm_width: H.
        grid: Rows and columns of patches.
        tokens: T, a square number; by default, half as many rows and columns as patches: 144 for 576.
        hidden: C.
        depth: Residual blocks before the pooling, and after it.

    Raises:
        UserError: There is no grid, or it cannot be pooled to this number of tokens.
    """

    def __init__(
        self,
        tower_width: int,
        llm_width: int,
        grid: Grid | None,
        tokens: int | None = None,
        hidden: int = 1024,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self._grid = require_grid("c_abstractor", grid)
        self._pooled = pooled_grid("c_abstractor", self._grid, tokens)
        self.before = nn.Sequential(*(_Block(hidden if place else tower_width, hidden) for place in range(depth)))
        width = hidden if depth else tower_width
        self.after = nn.Sequential(*(_Block(width, hidden) for _ in range(depth)))
        self.readout = nn.Sequential(nn.Linear(width, llm_width), nn.SiLU(), nn.Linear(llm_width, llm_width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project the features of some images."""
        pooled = adaptive_avg_pool2d(self.before(to_map(features, self._grid)), self._pooled)  # [B, C, rows, columns]
        projected: torch.Tensor = self.readout(to_tokens(self.after(pooled)))
        return projected


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``[B, C, rows, columns]``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.movedim(1, 3)).movedim(3, 1)


class _Block(nn.Module):
    """A residual block ``[B, C, rows, columns] -> [B, C', rows, columns]``."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        squeezed = max(1, width // _SQUEEZE)
        self.enter = nn.Sequential(nn.Conv2d(in_width, width, 1, bias=False), _ChannelNorm(width), nn.SiLU())
        self.neighbours = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), _ChannelNorm(width), nn.SiLU()
        )
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, squeezed, 1),
            nn.SiLU(),
            nn.Conv2d(squeezed, width, 1),
            nn.Sigmoid(),
        )
        self.leave = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), _ChannelNorm(width))
        self.shortcut: nn.Module = nn.Identity()
        if in_width != width:
            self.shortcut = nn.Sequential(nn.Conv2d(in_width, width, 1, bias=False), _ChannelNorm(width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.neighbours(self.enter(features))
        return silu(self.leave(hidden * self.excite(hidden)) + self.shortcut(features))
