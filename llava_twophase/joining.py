"""Join the features of several vision towers: concatenate them on channels, token by token.

Feature caches and towers that run on the fly are joined by the same functions, so both give the same values. The
published models that do this are Prismatic (arXiv:2402.07865), which needs equal numbers of tokens, and Cambrian-1
(arXiv:2406.16860), which resamples patch grids bilinearly in float32.

Shapes: B images; tower i gives L_i tokens of width D_i. L is L_0, D the sum of D_i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

from llava_twophase.errors import UserError

if TYPE_CHECKING:
    import torch

INTERPOLATE = "--interpolate_patch_grid"


def joined_shape(shapes: Sequence[tuple[int, int]], names: Sequence[str], interpolate: bool) -> tuple[int, int]:
    """Return the shape of joined features: L and D.

    Args:
        shapes: Tokens and width of each part.
        names: What to call each part in an error.
        interpolate: Resample patch grids of other sizes to the first one's.

    Raises:
        UserError: The numbers of tokens differ, and the grids are not or cannot be resampled.
    """
    tokens = shapes[0][0]
    for (found, _), name in zip(shapes, names, strict=True):
        if found == tokens:
            continue
        counts = f"{names[0]} has {tokens} tokens per image, {name} has {found}"
        if not interpolate:
            raise UserError(
                f"{counts}; joined features need equal numbers. {INTERPOLATE} True resamples the patch grid of {name} "
                f"to that of {names[0]}"
            )
        for count in (tokens, found):
            if isqrt(count) ** 2 != count:
                raise UserError(
                    f"{counts}; {INTERPOLATE} needs square patch grids, and {count} tokens are not one: use "
                    "--mm_vision_select_feature patch"
                )
    return tokens, sum(width for _, width in shapes)


def join_features(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate features on channels.

    Args:
        parts: ``[B, L_i, D_i]`` on one device; square patch grids where L_i differs from L.

    Returns:
        ``[B, L, D]``, in the smallest dtype that holds all parts exactly. A part of another grid is resampled in
        float32: bilinear, ``align_corners=False``, without antialiasing.
    """
    import torch

    tokens = parts[0].shape[1]
    return torch.cat([part if part.shape[1] == tokens else _resample(part, tokens) for part in parts], dim=2)


def joined_fingerprint(fingerprints: Sequence[Mapping[str, Any]], interpolate: bool) -> dict[str, Any]:
    """Return the fingerprint of joined features: those of the parts by position from 1, and whether grids are resized.

    ``parts_of_fingerprint`` is the inverse.
    """
    numbered = {str(position): dict(part) for position, part in enumerate(fingerprints, start=1)}
    return {"joined": numbered, "interpolate_patch_grid": interpolate}


def parts_of_fingerprint(fingerprint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fingerprints of the parts in their order; a fingerprint of one tower is its only part."""
    joined = fingerprint.get("joined")
    if not isinstance(joined, dict) or "interpolate_patch_grid" not in fingerprint:
        return [dict(fingerprint)]
    return [joined[str(position)] for position in range(1, len(joined) + 1)]


def _resample(features: torch.Tensor, tokens: int) -> torch.Tensor:
    from torch.nn.functional import interpolate

    side, wanted = isqrt(features.shape[1]), isqrt(tokens)
    grid = features.float().transpose(1, 2).unflatten(2, (side, side))  # [B, D_i, side, side]
    resampled = interpolate(grid, size=(wanted, wanted), mode="bilinear", align_corners=False)
    return resampled.flatten(2).transpose(1, 2)  # [B, L, D_i]
