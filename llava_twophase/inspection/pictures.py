"""Patch features as pictures beside their image, drawn with Pillow alone; knows nothing of caches.

Shapes: N images, L tokens, D width, G the side of the patch grid (24 for CLIP-L/14-336), S a panel's side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava_twophase.errors import UserError

# Dark blue over grey to yellow: even in lightness, and told apart by colour-blind eyes.
_RAMP = np.array([(0, 32, 77), (124, 123, 120), (255, 234, 70)], np.float32)
_MARGIN = 12
_LABEL = 22


@dataclass(frozen=True)
class Maps:
    """Features of some images as colours, ``uint8 [N, G, G, 3]``; one scale for all, so that colours mean the same.

    Attributes:
        pca: The first three principal components of all images' patches together.
        norms: Norms of the patches, dark blue to yellow.
        norm_range: The smallest and the largest norm.
        similarity: Cosine to the chosen patch of the first image, or None.
        similarity_range: The smallest and the largest cosine but that of the patch itself.
    """

    pca: np.ndarray
    norms: np.ndarray
    norm_range: tuple[float, float]
    similarity: np.ndarray | None = None
    similarity_range: tuple[float, float] = (0.0, 0.0)


def draw_maps(features: np.ndarray, fingerprint: dict[str, Any], patch: tuple[int, int] | None = None) -> Maps:
    """Turn features into colours.

    Args:
        features: float32 ``[N, L, D]``.
        fingerprint: The cache's; says whether a CLS token leads.
        patch: Row and column of the patch of the first image that all are compared with.

    Returns:
        The maps.

    Raises:
        UserError: The features are not finite, their tokens form no square, or there is no such patch.
    """
    if not np.isfinite(features).all():
        raise UserError("the features are not finite; verify names all such images")
    grids = np.stack([patch_grid(image, str(fingerprint.get("select_feature"))) for image in features])
    norms = np.linalg.norm(grids, axis=-1)  # [N, G, G]
    maps = Maps(pca_colours(grids), norm_colours(norms), (float(norms.min()), float(norms.max())))
    if patch is None:
        return maps
    if not (0 <= patch[0] < grids.shape[1] and 0 <= patch[1] < grids.shape[2]):
        raise UserError(f"--patch {patch[0]},{patch[1]} is outside the grid of {grids.shape[1]} x {grids.shape[2]}")
    unit = grids / np.maximum(norms[..., None], np.finfo(np.float32).tiny)
    cosine = unit @ unit[0, patch[0], patch[1]]  # [N, G, G]
    others = np.delete(cosine.reshape(-1), patch[0] * grids.shape[2] + patch[1])
    low, high = (float(others.min()), float(others.max())) if len(others) else (0.0, 1.0)
    return replace(maps, similarity=norm_colours(np.clip(cosine, low, high)), similarity_range=(low, high))


def sheet(pictures: Sequence[Image.Image], names: Sequence[str], maps: Maps, patch: Any, size: int) -> Image.Image:
    """Draw pictures beside their maps, a row for each.

    Args:
        pictures: What the tower saw, as ``crop`` makes it.
        names: What to call them.
        maps: Of all of them.
        patch: The chosen patch, marked in the first picture.
        size: S.

    Returns:
        One RGB picture.
    """
    kinds = [("patch features, PCA colours", maps.pca)]
    kinds.append(("token norms, {:.4g} (blue) to {:.4g} (yellow)".format(*maps.norm_range), maps.norms))
    if maps.similarity is not None:
        title = "cosine to patch {},{}: {:.2f} to {:.2f}".format(*patch, *maps.similarity_range)
        kinds.append((title, maps.similarity))
    height = size + _LABEL + _MARGIN
    canvas = Image.new("RGB", ((size + _MARGIN) * (1 + len(kinds)) + _MARGIN, height * len(names) + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        panels = [(name, picture), *((title, _enlarged(colours[row], size)) for title, colours in kinds)]
        for column, (label, panel) in enumerate(panels):
            left, top = _MARGIN + column * (size + _MARGIN), _MARGIN + row * height
            canvas.paste(panel, (left, top))
            draw.text((left, top + size + 6), label, fill="black", font=_font(label, size))
            if patch is not None and row == 0:
                _mark(draw, left, top, patch, size / maps.pca.shape[1])
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


def pca_colours(grids: np.ndarray) -> np.ndarray:
    """Turn the first three principal components of patches into red, green and blue.

    Args:
        grids: ``[..., D]``: the patches of one image or of several, which then share one basis.

    Returns:
        ``uint8 [..., 3]``, each channel spread from its 1st to its 99th percentile.
    """
    tokens = grids.reshape(-1, grids.shape[-1]).astype(np.float64)
    tokens = tokens - tokens.mean(axis=0)  # [N * L, D]
    variances, axes = np.linalg.eigh(tokens.T @ tokens)  # ascending
    axes = axes[:, ::-1].T[:3]
    # What is left of directions without variance is rounding, and no colour.
    axes = axes[variances[::-1][:3] > 1e-12 * max(float(variances[-1]), np.finfo(np.float64).tiny)]
    colours = np.zeros((len(tokens), 3))
    if len(axes):
        # The sign of a component is arbitrary: its largest weight is made positive, so that equal features look equal.
        largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)  # [3, 1]
        components = tokens @ (axes * np.where(largest < 0, -1, 1)).T  # [N * L, 3]
        low, high = np.percentile(components, (1, 99), axis=0)
        spread = np.where(high > low, high - low, 1)
        colours[:, : components.shape[1]] = np.clip((components - low) / spread, 0, 1)
    return (colours * 255).round().astype(np.uint8).reshape(*grids.shape[:-1], 3)


def norm_colours(norms: np.ndarray) -> np.ndarray:
    """Turn numbers ``[...]`` into colours ``uint8 [..., 3]``: the smallest dark blue, the largest yellow."""
    spread = float(norms.max() - norms.min()) or 1.0
    place = (norms - norms.min()) / spread * (len(_RAMP) - 1)
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


def _mark(draw: ImageDraw.ImageDraw, left: int, top: int, patch: tuple[int, int], side: float) -> None:
    # White within black stands out from any picture.
    x, y = left + patch[1] * side, top + patch[0] * side
    draw.rectangle((x - 1, y - 1, x + side, y + side), outline="black", width=3)
    draw.rectangle((x, y, x + side - 1, y + side - 1), outline="white", width=1)


def _font(label: str, width: int) -> Any:
    for points in (13, 12, 11, 10, 9, 8):
        font = ImageFont.load_default(points)
        if font.getlength(label) <= width:
            break
    return font
