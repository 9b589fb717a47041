"""S2, LLaVA's multi-scale mode: ``--s2 True --s2_scales 336,672,1008``.

The method is that of "When Do We Not Need Larger Vision Models?" (arXiv:2403.13043) as LLaVA's ``CLIPVisionTowerS2``
(commit c121f04) uses it. The image processor crops at the largest scale. The other scales are resampled from its pixel
values, bicubic without antialiasing. Each scale is divided into tiles of the tower's size, and each tile is encoded
alone. The patches of a scale are put together and averaged down to the grid of one tile. The scales are concatenated on
channels.

Shapes: B images, S the largest scale, T the side of a tile in pixels, G its patches per side, D the tower's width, K
scales, N tiles per side of one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import TYPE_CHECKING

from llava_twophase.errors import UserError

if TYPE_CHECKING:
    import torch

DEFAULT_SCALES = "336,672,1008"


def parse_scales(s2: bool, text: str) -> tuple[int, ...]:
    """Return the scales of ``--s2`` and ``--s2_scales``, smallest first as in LLaVA; none without ``--s2 True``.

    Raises:
        UserError: The text is not a list of two or more different sizes in pixels.
    """
    if not s2:
        return ()
    parts = text.split(",")
    scales = sorted({int(part) for part in parts if part.strip().isdecimal()})
    if len(scales) < len(parts) or len(scales) < 2 or scales[0] == 0:
        raise UserError(f"--s2_scales {text}: expected two or more sizes in pixels, such as {DEFAULT_SCALES}")
    return tuple(scales)


def require_multiples(scales: Sequence[int], tile: int, vision_tower: str) -> None:
    """Check that scales are multiples of the tower's crop, and that the crop is the smallest one.

    Args:
        scales: Sides in pixels, smallest first.
        tile: T.
        vision_tower: The tower, for the error.

    Raises:
        UserError: They are not.
    """
    if scales[0] != tile or any(scale % tile for scale in scales):
        raise UserError(
            f"--s2_scales {','.join(map(str, scales))}: --vision_tower {vision_tower} takes crops of {tile} px; "
            f"expected {tile} and multiples of it, such as {tile},{2 * tile},{3 * tile}"
        )


def multi_scale_features(
    encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, scales: Sequence[int]
) -> torch.Tensor:
    """Encode images at several scales.

    Args:
        encode: Turns tiles ``[B, 3, T, T]`` into patch features ``[B, G * G, D]``: the same tile of all images.
        pixels: ``float32 [B, 3, S, S]``, S the last scale.
        scales: Sides in pixels, multiples of the first one, T.

    Returns:
        ``[B, G * G, D * K]`` in the dtype of ``encode``; the first scale has the first channels.
    """
    import torch

    return torch.cat([_encode_scale(encode, pixels, scale, scales[0]) for scale in scales], dim=-1)


def _encode_scale(
    encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, scale: int, tile: int
) -> torch.Tensor:
    import torch
    from torch.nn.functional import interpolate

    if scale != pixels.shape[-1]:
        pixels = interpolate(pixels, size=(scale, scale), mode="bicubic")
    # Views and concatenations keep the layout in memory that LLaVA's have, and how a mean rounds depends on it.
    rows = []
    for row in pixels.split(tile, dim=2):  # [B, 3, T, S]
        maps = [encode(part).transpose(1, 2) for part in row.split(tile, dim=3)]  # N of [B, D, G * G]
        side = isqrt(maps[0].shape[2])
        rows.append(torch.cat([part.reshape(*part.shape[:2], side, side) for part in maps], dim=3))
    grid = torch.cat(rows, dim=2)  # [B, D, N * G, N * G]
    pooled = interpolate(grid.float(), size=(side, side), mode="area").to(grid.dtype)
    return pooled.flatten(2).transpose(1, 2)  # [B, G * G, D]
