"""A region of a resized image, with the bits of Pillow's ``resize`` but without making the rest of it.

A CLIP processor resizes the shortest edge to 336 and crops the centre. For an image of 3000 x 1 pixels Pillow makes
1,008,000 x 336 pixels, of which the crop keeps 336 x 336. The functions here compute the kept pixels only.

Pillow resizes 8-bit images in two passes. Each pass rounds its weights to 22 bits and its results to 8 bits, so every
pixel is the result of integer arithmetic and can be computed on its own. The functions here run the horizontal pass
first. Pillow 13 runs the vertical pass first if an image loses more than twice as many rows as columns; that does not
happen to images that are enlarged and to square canvases, for which these functions are used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

_PRECISION = 1 << 22
_SUPPORT = {Image.Resampling.BILINEAR: 1.0, Image.Resampling.BICUBIC: 2.0}


@dataclass(frozen=True)
class Canvas:
    """An image on a larger canvas of one colour; the canvas itself is never made.

    Attributes:
        width: Width of the canvas in pixels.
        height: Height of the canvas.
        left: Column of the image's left edge.
        top: Row of the image's upper edge.
        color: RGB colour around the image.
    """

    width: int
    height: int
    left: int = 0
    top: int = 0
    color: tuple[int, ...] = (0, 0, 0)


@dataclass(frozen=True)
class Region:
    """A rectangle of the resized canvas, in pixels."""

    left: int
    top: int
    width: int
    height: int


def is_supported(resample: int) -> bool:
    """Return whether ``resize_region`` knows a resampling filter."""
    return resample in _SUPPORT


def resize_region(
    image: np.ndarray, canvas: Canvas, size: tuple[int, int], region: Region, resample: int
) -> np.ndarray:
    """Resize an image on its canvas and return a region of the result, bit-equal to Pillow.

    Args:
        image: ``uint8 [height, width, 3]``.
        canvas: Where the image is on its canvas.
        size: Width and height of the resized canvas.
        region: The part of the resized canvas to return.
        resample: Pillow's number of the filter, bilinear or bicubic.

    Returns:
        ``uint8 [region.height, region.width, 3]``.
    """
    columns = [_weights(canvas.width, size[0], region.left + x, resample) for x in range(region.width)]
    rows = [_weights(canvas.height, size[1], region.top + y, resample) for y in range(region.height)]
    # Only rows that the vertical pass reads.
    first = max(0, min(start for start, _ in rows) - canvas.top)
    last = max(first, min(len(image), max(start + len(weights) for start, weights in rows) - canvas.top))
    color = np.array(canvas.color, np.float64)[None]  # [1, 3]
    wide = _resample(image[first:last], canvas.left, columns, color)  # [rows, region.width, 3]
    empty = _resample(np.empty((1, 0, 3), np.uint8), canvas.left, columns, color)  # a row of the canvas's colour
    tall = _resample(wide.transpose(1, 0, 2), canvas.top + first, rows, empty[0].astype(np.float64))
    return np.ascontiguousarray(tall.transpose(1, 0, 2))


def _resample(lines: np.ndarray, offset: int, outputs: list[tuple[int, np.ndarray]], color: np.ndarray) -> np.ndarray:
    # One pass along the second axis of lines [N, length, 3], which begin at `offset` on a canvas of `color` [N, 3].
    result = np.empty((len(lines), len(outputs), 3), np.uint8)
    end = offset + lines.shape[1]
    for position, (start, weights) in enumerate(outputs):
        begin, stop = max(start, offset), min(start + len(weights), end)
        # Sums of integers below 2 ** 53 are exact in float64, in any order.
        total = np.full((len(lines), 3), _PRECISION / 2)
        outside = weights.sum()
        if begin < stop:
            inside = weights[begin - start : stop - start]
            total += np.tensordot(lines[:, begin - offset : stop - offset].astype(np.float64), inside, (1, 0))
            outside -= inside.sum()
        total += color * outside
        result[:, position] = np.clip(np.floor(total / _PRECISION), 0, 255)
    return result


def _weights(in_size: int, out_size: int, position: int, resample: int) -> tuple[int, np.ndarray]:
    # First input pixel of one output pixel, and the integer weights of the pixels from there on. The operations and
    # their order are those of Pillow, which computes the edges of the input as float32.
    scale = float(np.float32(in_size)) / out_size
    filter_scale = max(scale, 1.0)
    support = _SUPPORT[Image.Resampling(resample)] * filter_scale
    center = (position + 0.5) * scale
    start = max(0, int(center - support + 0.5))
    stop = min(in_size, int(center + support + 0.5))
    distance = np.abs((np.arange(start, stop) - center + 0.5) * (1.0 / filter_scale))
    weights = _bicubic(distance) if resample == Image.Resampling.BICUBIC else np.maximum(1.0 - distance, 0.0)
    total = float(np.cumsum(weights)[-1]) if len(weights) else 0.0  # cumsum adds in order, sum does not
    if total:
        weights = weights / total
    return start, np.trunc(np.copysign(0.5, weights) + weights * _PRECISION)


def _bicubic(distance: np.ndarray) -> np.ndarray:
    near = ((-0.5 + 2.0) * distance - (-0.5 + 3.0)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    return np.where(distance < 1.0, near, np.where(distance < 2.0, far, 0.0))


def shortest_edge_size(width: int, height: int, shortest_edge: int) -> tuple[int, int]:
    """Return width and height after resizing the shortest edge, rounded down as the Hugging Face processors do."""
    short, long = min(width, height), max(width, height)
    new_long = int(shortest_edge * long / short)
    return (shortest_edge, new_long) if width <= height else (new_long, shortest_edge)


def center_region(size: tuple[int, int], crop: tuple[int, int]) -> Region | None:
    """Return the centre crop of a resized image; None if the image is smaller than the crop.

    Args:
        size: Width and height of the resized image.
        crop: Width and height of the crop.
    """
    left, top = math.floor((size[0] - crop[0]) / 2), math.floor((size[1] - crop[1]) / 2)
    return Region(left, top, *crop) if left >= 0 and top >= 0 else None
