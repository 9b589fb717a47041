"""The square grid of patches that a row of tokens comes from.

Shapes: B images, L = g * g patch tokens in rows from the top left, D width.
"""

from __future__ import annotations

from math import isqrt

import torch

from llava_twophase.errors import UserError
from llava_twophase.patch_grid import grid_shape

Grid = tuple[int, int]
"""Rows and columns of patches."""


def square_grid(patches: int) -> Grid | None:
    """Return the grid of ``[L, D]`` features; None if L is not a square, as with a CLS token (577)."""
    return grid_shape(patches, "patch")


def require_grid(kind: str, grid: Grid | None) -> Grid:
    """Return the grid of a projector type that needs one.

    Raises:
        UserError: There is none.
    """
    if grid is None:
        raise UserError(
            f"--mm_projector_type {kind} needs a square grid of patches, which these features do not have (a CLS token "
            "is one more): use --mm_vision_select_feature patch, or a type without a grid: linear, mlp2x_gelu, "
            "perceiver"
        )
    return grid


def require_blocks(kind: str, grid: Grid, factor: int) -> Grid:
    """Return the grid of the blocks of ``factor * factor`` patches.

    Raises:
        UserError: The grid cannot be divided into such blocks.
    """
    rows, columns = grid
    if not isinstance(factor, int) or factor < 1 or rows % factor or columns % factor:
        fitting = [number for number in range(2, rows + 1) if not rows % number and not columns % number]
        raise UserError(
            f"--mm_projector_type {kind}: {rows} x {columns} patches cannot be divided into blocks of {factor} x "
            f"{factor}; give --mm_projector_kwargs '{{\"factor\": N}}' with N of {fitting}"
        )
    return rows // factor, columns // factor


def pooled_grid(kind: str, grid: Grid, tokens: int | None) -> Grid:
    """Return the grid after pooling to a number of tokens; by default, half as many rows and columns, rounded up.

    Raises:
        UserError: The number is not a square, or there are fewer patches.
    """
    rows, columns = grid
    if tokens is None:
        return -(-rows // 2), -(-columns // 2)
    side = isqrt(tokens) if isinstance(tokens, int) and tokens > 0 else 0
    if not side or side * side != tokens or side > min(grid):
        raise UserError(
            f'--mm_projector_kwargs {{"tokens": {tokens}}}: {kind} gives a square number of tokens from 1 to the '
            f"{rows * columns} patches, such as {(rows // 2) * (columns // 2)}"
        )
    return side, side


def to_map(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return tokens ``[B, L, D]`` as a feature map ``[B, D, rows, columns]``."""
    batch, _, width = tokens.shape
    return tokens.transpose(1, 2).reshape(batch, width, *grid)


def to_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    """Return a feature map ``[B, D, rows, columns]`` as tokens ``[B, L, D]``."""
    return feature_map.flatten(2).transpose(1, 2)
