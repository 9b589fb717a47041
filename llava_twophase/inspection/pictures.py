"""Draw patch features as pictures next to their image, by Pillow.

Shapes: N images, L tokens, D width, G the side of the patch grid (24 for CLIP-L/14-336), S a panel's side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava_twophase.errors import UserError
from llava_twophase.patch_grid import grid_shape
from llava_twophase.text import counted, printable

# Dark blue over grey to yellow: lightness grows evenly, and colour-blind readers can tell the colours apart.
_RAMP = np.array([(0, 32, 77), (124, 123, 120), (255, 234, 70)], np.float32)
_MARGIN = 12
_LABEL = 22
_MOST_PIXELS = 400_000_000


@dataclass(frozen=True)
class Maps:
    """Features of some images as colours, ``uint8 [N, G, G, 3]``, on one scale for all images.

    Attributes:
        pca: The first three principal components of all images' patches together.
        norms: Norms of the patches, dark blue to yellow.
        norm_range: The smallest and the largest norm.
        similarity: Cosine to the chosen patch of the first image, or None.
        similarity_range: The smallest and the largest cosine, except that of the patch itself.
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
        fingerprint: The cache's; its ``select_feature`` says whether there is a CLS token.
        patch: Row and column of the patch of the first image that all patches are compared with.

    Returns:
        The maps.

    Raises:
        UserError: The features are not finite, their tokens form no square, or there is no such patch.
    """
    if not np.isfinite(features).all():
        raise UserError("the features are not finite; run verify, which reports all such images")
    grids = np.stack([patch_grid(image, fingerprint.get("select_feature")) for image in features])
    norms = np.stack([np.linalg.norm(grid.astype(np.float64), axis=-1) for grid in grids])  # [N, G, G]
    maps = Maps(pca_colours(grids), norm_colours(norms), (float(norms.min()), float(norms.max())))
    if patch is None:
        return maps
    row, column = patch
    if not (0 <= row < grids.shape[1] and 0 <= column < grids.shape[2]):
        raise UserError(f"--patch {row},{column} is outside the grid of {grids.shape[1]} x {grids.shape[2]}")
    unit = grids / np.maximum(norms[..., None], np.finfo(np.float32).tiny)
    cosine = unit @ unit[0, row, column]  # [N, G, G]
    others = np.delete(cosine.reshape(-1), row * grids.shape[2] + column)
    low, high = (float(others.min()), float(others.max())) if len(others) else (0.0, 1.0)
    return replace(maps, similarity=norm_colours(np.clip(cosine, low, high)), similarity_range=(low, high))


def check_sheet(count: int, size: int) -> None:
    """Check that a picture of so many images is not too large.

    Raises:
        UserError: It is.
    """
    pixels = 4 * (size + _MARGIN) * count * (size + _LABEL + _MARGIN)
    if pixels > _MOST_PIXELS:
        raise UserError(
            f"{counted(count, 'image')} at --size {size}: a picture of {pixels / 1e6:,.0f} million pixels; "
            f"at most {_MOST_PIXELS // 1_000_000} are drawn; give fewer keys or a smaller --size"
        )


def sheet(
    pictures: Sequence[Image.Image], names: Sequence[str], maps: Maps, patch: tuple[int, int] | None, size: int
) -> Image.Image:
    """Draw images and their maps, one row for each image.

    Args:
        pictures: What the tower saw, from ``crop``.
        names: Labels of the images.
        maps: Maps of all images.
        patch: The chosen patch, marked in the first image.
        size: S.

    Returns:
        One RGB picture.
    """
    kinds = [("patch features, PCA colours", maps.pca)]
    kinds.append(("token norms, {:.4g} (blue) to {:.4g} (yellow)".format(*maps.norm_range), maps.norms))
    if maps.similarity is not None and patch is not None:
        title = "cosine to patch {},{}: {:.2f} to {:.2f}".format(*patch, *maps.similarity_range)
        kinds.append((title, maps.similarity))
    height = size + _LABEL + _MARGIN
    canvas = Image.new("RGB", ((size + _MARGIN) * (1 + len(kinds)) + _MARGIN, height * len(names) + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        panels = [(printable(name), picture), *((title, _enlarged(colours[row], size)) for title, colours in kinds)]
        for column, (label, panel) in enumerate(panels):
            left, top = _MARGIN + column * (size + _MARGIN), _MARGIN + row * height
            canvas.paste(panel, (left, top))
            draw.text((left, top + size + 6), label, fill="black", font=_font(label, size))
            if patch is not None and row == 0:
                _mark(draw, left, top, patch, size / maps.pca.shape[1])
    return canvas


def patch_grid(features: np.ndarray, select_feature: object) -> np.ndarray:
    """Arrange tokens as the patches of the image.

    Args:
        features: ``[L, D]``.
        select_feature: Of the fingerprint. Unless it is ``patch``, a first token is dropped as CLS if the other tokens
            form a square and all of them do not.

    Returns:
        ``[G, G, D]``.

    Raises:
        UserError: The tokens form no square.
    """
    grid = grid_shape(len(features), select_feature)
    if grid is None:
        raise UserError(f"{len(features)} tokens form no square grid of patches, so they cannot be shown")
    return features[len(features) - grid[0] * grid[1] :].reshape(*grid, -1)


def pca_colours(grids: np.ndarray) -> np.ndarray:
    """Return the first three principal components of features as colours.

    Args:
        grids: Finite features ``[..., D]``; a leading axis of images is processed one image at a time.

    Returns:
        ``uint8 [..., 3]``, black in a component without variance.
    """
    width = grids.shape[-1]
    images = grids.reshape(-1, grids.shape[-2] * grids.shape[-3], width)  # [N, L, D]
    mean = images.mean((0, 1), dtype=np.float64)
    covariance = np.zeros((width, width))
    for image in images:
        centred = image - mean
        covariance += centred.T @ centred
    variances, axes = np.linalg.eigh(covariance)  # ascending
    axes = axes[:, ::-1].T[:3]
    # A direction without variance holds rounding errors only.
    axes = axes[variances[::-1][:3] > 1e-12 * max(float(variances[-1]), np.finfo(np.float64).tiny)]
    colours = np.zeros((len(images) * images.shape[1], 3))
    if len(axes):
        # The sign of a component is arbitrary: its largest weight is made positive, so that equal features look equal.
        largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)  # [3, 1]
        axes = axes * np.where(largest < 0, -1, 1)
        components = np.concatenate([(image - mean) @ axes.T for image in images])  # [N * L, 3]
        low, high = np.percentile(components, (1, 99), axis=0)
        spread = np.where(high > low, high - low, 1)
        colours[:, : components.shape[1]] = np.clip((components - low) / spread, 0, 1)
    return (colours * 255).round().astype(np.uint8).reshape(*grids.shape[:-1], 3)


def norm_colours(norms: np.ndarray) -> np.ndarray:
    """Return numbers ``[...]`` as colours ``uint8 [..., 3]``, the smallest dark blue and the largest yellow."""
    spread = float(norms.max() - norms.min()) or 1.0
    place = (norms - norms.min()) / spread * (len(_RAMP) - 1)
    stops = np.arange(len(_RAMP))
    channels = [np.interp(place, stops, _RAMP[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def crop(picture: Image.Image, fingerprint: dict[str, Any], size: int) -> Image.Image:
    """Return the part of an image that the tower saw, for display: it is resampled directly to ``size``.

    Args:
        picture: RGB picture.
        fingerprint: ``image_aspect_ratio`` and ``processor`` say which part; without them it is the centre square.
        size: S.

    Returns:
        ``S x S``.
    """
    processor = _mapping(fingerprint.get("processor"))
    if fingerprint.get("image_aspect_ratio") == "pad":
        picture = _padded(picture, processor.get("image_mean"), size)
    resized, cropped = _mapping(processor.get("size")), _mapping(processor.get("crop_size"))
    if "height" in resized and "width" in resized:
        return picture.resize((size, size), Image.Resampling.BICUBIC)
    fraction = 1.0
    edge, height = _positive(resized.get("shortest_edge")), _positive(cropped.get("height"))
    if edge and height and processor.get("do_center_crop", True):
        fraction = min(1.0, height / edge)
    side = min(picture.size) * fraction
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and value > 0 else None


def _padded(picture: Image.Image, mean: Any, size: int) -> Image.Image:
    # Reduced first: the square of a thin image could be larger than memory.
    if not (isinstance(mean, list) and len(mean) == 3 and all(map(_positive, mean))):
        mean = (0.5, 0.5, 0.5)
    scale = 2 * size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    canvas = Image.new("RGB", (2 * size, 2 * size), tuple(int(value * 255) for value in mean))
    canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (size - width // 2, size - height // 2))
    return canvas


def _enlarged(colours: np.ndarray, size: int) -> Image.Image:
    # Without interpolation: a patch is a square of one colour.
    return Image.fromarray(colours).resize((size, size), Image.Resampling.NEAREST)


def _mark(draw: ImageDraw.ImageDraw, left: int, top: int, patch: tuple[int, int], side: float) -> None:
    # White inside black is visible on any picture.
    x, y = left + patch[1] * side, top + patch[0] * side
    draw.rectangle((x - 1, y - 1, x + side, y + side), outline="black", width=3)
    draw.rectangle((x, y, x + side - 1, y + side - 1), outline="white", width=1)


def _font(label: str, width: int) -> Any:
    for points in (13, 12, 11, 10, 9, 8):
        font = ImageFont.load_default(points)
        if font.getlength(label) <= width:
            break
    return font
