"""Patch features as pictures beside their image, drawn with Pillow alone; knows nothing of caches.

Shapes: L tokens, D width, G the side of the patch grid (24 for CLIP-L/14-336), S a panel's side in pixels.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava_twophase.errors import UserError

# Dark blue over grey to yellow: even in lightness, and told apart by colour-blind eyes.
_RAMP = np.array([(0, 32, 77), (124, 123, 120), (255, 234, 70)], np.float32)
_MARGIN = 12
_LABEL = 22


def show(picture: Image.Image, features: np.ndarray, fingerprint: dict[str, Any], size: int = 336) -> Image.Image:
    """Draw a picture, its patch features as PCA colours, and their norms, side by side.

    Args:
        picture: The RGB picture.
        features: Its features ``float32 [L, D]``.
        fingerprint: The cache's; says how the crop was made and whether a CLS token leads.
        size: S.

    Returns:
        One RGB picture.

    Raises:
        UserError: The features are not finite, or their tokens form no square.
    """
    if not np.isfinite(features).all():
        raise UserError("the features are not finite; verify names all such images")
    grid = patch_grid(features, str(fingerprint.get("select_feature")))  # [G, G, D]
    norms = np.linalg.norm(grid, axis=-1)  # [G, G]
    panels = [
        ("the picture as the tower saw it", crop(picture, fingerprint, size)),
        ("patch features, PCA colours", _enlarged(pca_colours(grid), size)),
        (f"token norms, {norms.min():.4g} (blue) to {norms.max():.4g} (yellow)", _enlarged(norm_colours(norms), size)),
    ]
    width = (size + _MARGIN) * len(panels) + _MARGIN
    canvas = Image.new("RGB", (width, size + _LABEL + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (label, panel) in enumerate(panels):
        left = _MARGIN + number * (size + _MARGIN)
        canvas.paste(panel, (left, _MARGIN))
        draw.text((left, _MARGIN + size + 6), label, fill="black", font=_font(label, size))
    return canvas


def patch_grid(features: np.ndarray, select_feature: str) -> np.ndarray:
    """Lay tokens out as the image's patches.

    Args:
        features: ``[L, D]``.
        select_feature: With ``cls_patch``, a leading token that makes the rest a square is dropped.

    Returns:
        ``[G, G, D]``.

    Raises:
        UserError: The tokens form no square.
    """
    side = isqrt(len(features))
    if side * side != len(features) and select_feature == "cls_patch":
        features = features[1:]
        side = isqrt(len(features))
    if side * side != len(features):
        raise UserError(f"{len(features)} tokens form no square grid of patches, so they cannot be shown")
    return features.reshape(side, side, -1)


def pca_colours(grid: np.ndarray) -> np.ndarray:
    """Turn the first three principal components of one image's patches into red, green and blue.

    Args:
        grid: ``[G, G, D]``.

    Returns:
        ``uint8 [G, G, 3]``, each channel spread from its 1st to its 99th percentile.
    """
    tokens = grid.reshape(-1, grid.shape[-1]).astype(np.float64)
    tokens = tokens - tokens.mean(axis=0)  # [L, D]
    _, _, axes = np.linalg.svd(tokens, full_matrices=False)
    axes = axes[:3]
    # The sign of a component is arbitrary: its largest weight is made positive, so that equal features look equal.
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)  # [3, 1]
    components = tokens @ (axes * np.where(largest < 0, -1, 1)).T  # [L, 3]
    low, high = np.percentile(components, (1, 99), axis=0)
    spread = np.where(high > low, high - low, 1)
    colours = np.zeros((len(tokens), 3))
    colours[:, : components.shape[1]] = np.clip((components - low) / spread, 0, 1)
    return (colours * 255).round().astype(np.uint8).reshape(*grid.shape[:2], 3)


def norm_colours(norms: np.ndarray) -> np.ndarray:
    """Turn norms ``[G, G]`` into colours ``uint8 [G, G, 3]``: the smallest dark blue, the largest yellow."""
    spread = float(norms.max() - norms.min()) or 1.0
    place = (norms - norms.min()) / spread * (len(_RAMP) - 1)  # [G, G]
    stops = np.arange(len(_RAMP))
    channels = [np.interp(place, stops, _RAMP[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def crop(picture: Image.Image, fingerprint: dict[str, Any], size: int) -> Image.Image:
    """Cut out what the tower saw, to look at: resampled straight to ``size``, so not equal to its pixels.

    Args:
        picture: The RGB picture.
        fingerprint: Its ``image_aspect_ratio`` and ``processor`` say what was cut; without them, a centre square.
        size: S.

    Returns:
        ``S x S``.
    """
    processor = fingerprint.get("processor") or {}
    if fingerprint.get("image_aspect_ratio") == "pad":
        picture = _padded(picture, processor.get("image_mean") or (0.5, 0.5, 0.5), size)
    resized, cropped = processor.get("size") or {}, processor.get("crop_size") or {}
    if "height" in resized and "width" in resized:
        return picture.resize((size, size), Image.Resampling.BICUBIC)
    fraction = 1.0
    if "shortest_edge" in resized and "height" in cropped and processor.get("do_center_crop", True):
        fraction = min(1.0, cropped["height"] / resized["shortest_edge"])
    width, height = picture.size
    side = min(width, height) * fraction
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _padded(picture: Image.Image, mean: Any, size: int) -> Image.Image:
    # Made small first: the square of a long strip could be larger than memory.
    scale = 2 * size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    canvas = Image.new("RGB", (2 * size, 2 * size), tuple(int(value * 255) for value in mean))
    canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (size - width // 2, size - height // 2))
    return canvas


def _enlarged(colours: np.ndarray, size: int) -> Image.Image:
    # Hard edges: a patch is a square, and no colour is made up between two.
    return Image.fromarray(colours).resize((size, size), Image.Resampling.NEAREST)


def _font(label: str, width: int) -> Any:
    for points in (13, 12, 11, 10, 9, 8):
        font = ImageFont.load_default(points)
        if font.getlength(label) <= width:
            break
    return font
