"""``perceiver``: learned queries read the patches by cross-attention, as in Flamingo's perceiver resampler.

Flamingo (arXiv 2204.14198): the queries attend to the patches and to themselves, then a feed-forward
layer follows, ``depth`` times. Qwen-VL (arXiv 2308.12966) has one layer with 256 queries, and adds fixed
two-dimensional sine and cosine positions to the keys of the patches: ``queries=256, depth=1, positions=True``.

Shapes: B images, L patches, D tower width, Q queries, H LLM width, h heads of width d.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from llava_twophase.errors import UserError
from llava_twophase.projectors.grid import Grid, require_grid


class PerceiverResampler(nn.Module):
    """Maps ``[B, L, D]`` to ``[B, Q, H]``, whatever L is.

    Args:
        tower_width: D.
        llm_width: H.
        grid: Rows and columns of patches; only ``positions`` needs it.
        queries: Q, image tokens.
        depth: Layers.
        heads: Attention heads.
        head_width: Width of a head.
        positions: Add two-dimensional positions to the keys of the patches.

    Raises:
        UserError: A number is too small; or positions need a grid, or a tower width that is a multiple of 4.
    """

    def __init__(
        self,
        tower_width: int,
        llm_width: int,
        grid: Grid | None,
        queries: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_width: int = 64,
        positions: bool = False,
    ) -> None:
        super().__init__()
        if min(queries, depth, heads, head_width) < 1:
            raise UserError(
                f"--mm_projector_kwargs: perceiver needs queries, depth, heads and head_width of at least 1; found "
                f"{queries}, {depth}, {heads} and {head_width}"
            )
        self.queries = nn.Parameter(torch.randn(queries, tower_width) * tower_width**-0.5)
        self.layers = nn.ModuleList(_Layer(tower_width, heads, head_width) for _ in range(depth))
        self.norm = nn.LayerNorm(tower_width)
        self.project = nn.Linear(tower_width, llm_width)
        self.positions: torch.Tensor | None
        table = sine_positions(require_grid("perceiver with positions", grid), tower_width) if positions else None
        self.register_buffer("positions", table, persistent=False)  # [L, D]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project the features of some images."""
        latents = self.queries.expand(len(features), -1, -1)  # [B, Q, D]
        for layer in self.layers:
            latents = layer(latents, features, self.positions)
        projected: torch.Tensor = self.project(self.norm(latents))
        return projected


class _Layer(nn.Module):
    """Cross-attention and a feed-forward layer, each with a shortcut."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        inner = heads * head_width
        self._heads = heads
        self.norm_features, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key, self.value = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, latents: torch.Tensor, features: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        queries, patches = self.norm_latents(latents), self.norm_features(features)
        placed = patches if positions is None else patches + positions.to(patches.dtype)
        keys = torch.cat([placed, queries], dim=1)  # [B, L + Q, D]
        values = torch.cat([patches, queries], dim=1)
        mixed = scaled_dot_product_attention(
            self._split(self.query(queries)), self._split(self.key(keys)), self._split(self.value(values))
        )  # [B, h, Q, d]
        latents = latents + self.out(mixed.transpose(1, 2).flatten(2))
        forwarded: torch.Tensor = latents + self.feed_forward(latents)
        return forwarded

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length, _ = tokens.shape
        return tokens.view(batch, length, self._heads, -1).transpose(1, 2)  # [B, h, length, d]


def sine_positions(grid: Grid, width: int) -> torch.Tensor:
    """Return positions ``[L, D]``: sines and cosines of the row in the first half of the channels, then of the column.

    Raises:
        UserError: The width is not a multiple of 4.
    """
    if width % 4:
        raise UserError(
            f"--mm_projector_kwargs: perceiver with positions needs a tower width that is a multiple of 4, not {width}"
        )
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    angles = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]  # [L, D / 4] each
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
