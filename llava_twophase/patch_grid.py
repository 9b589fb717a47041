"""The patch grid of features: how many rows and columns of patches the tokens of an image are."""

from __future__ import annotations

from math import isqrt


def grid_shape(tokens: int, select_feature: object) -> tuple[int, int] | None:
    """Return the rows and columns of patches in the features of one image.

    All towers have square grids, so the number of tokens decides. Patches are the last tokens, row by row.

    Args:
        tokens: Tokens of one image, L.
        select_feature: ``patch`` or ``cls_patch``, of the flags or the fingerprint. Unless it is ``patch``, a first
            token is taken for CLS if the other tokens form a square and all of them do not.

    Returns:
        Rows and columns; None if the tokens form no square.
    """
    for patches in (tokens, tokens - 1) if select_feature != "patch" else (tokens,):
        side = isqrt(max(0, patches))
        if side and side * side == patches:
            return side, side
    return None
