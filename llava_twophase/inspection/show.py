"""``show``: images and their patch features, as one PNG."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from llava_twophase.errors import UserError, combined_error
from llava_twophase.inspection import output, pictures
from llava_twophase.inspection.rows import CheckedRows
from llava_twophase.text import counted, printable
from llava_twophase.vision.images import BadImage, decode
from llava_twophase.vision.sources import ImageSource


def run(
    path: str, keys: Sequence[str], image_folder: str, png: str, *, patch: tuple[int, int] | None, size: int
) -> int:
    """Draw images.

    Args:
        path: The cache's directory.
        keys: Image keys.
        image_folder: Folder or archive of the images.
        png: File to write.
        patch: Row and column of the patch of the first image that all patches are compared with.
        size: Side of each panel in pixels.
    """
    rows = CheckedRows(path)
    output.check_output(png)
    pictures.check_sheet(len(keys), size)
    found = rows.find(keys)
    crops = _crops(rows, rows.open_images(image_folder), found, image_folder, size)
    maps = pictures.draw_maps(rows.values(found), rows.cache.fingerprint, patch)
    names = rows.keys(found)
    drawn = pictures.sheet(crops, names, maps, patch, size)
    output.write_file(png, lambda file: drawn.save(file, format="PNG"))
    output.print_written(png, ", ".join(names))
    return 0


def seen(rows: CheckedRows, images: ImageSource, row: int, size: int) -> tuple[Image.Image, str]:
    """Return the part of an image that the tower saw, and a warning if the file may be another one.

    Args:
        rows: The cache.
        images: Where image files are.
        row: The image.
        size: Side of the crop in pixels.

    Returns:
        The crop, and a warning, empty if the file is the one that the features were made from.

    Raises:
        BadImage: It cannot be read or decoded.
    """
    data = images.read(rows.keys([row])[0])
    source, warning = rows.source(row), ""
    if source is None:
        warning = "the cache does not record which file the features were made from"
    elif hashlib.sha256(data).digest() != source[1]:
        warning = "the file is not the one that the features were made from"
    return pictures.crop(decode(data), rows.cache.fingerprint, size), warning


def _crops(rows: CheckedRows, images: ImageSource, found: np.ndarray, folder: str, size: int) -> list[Image.Image]:
    crops, problems = [], []
    for row, key in zip(found.tolist(), rows.keys(found), strict=True):
        try:
            crop, warning = seen(rows, images, row, size)
        except BadImage as error:
            problems.append(f"{Path(folder) / key}: {error}")
            continue
        if warning:
            print(f"warning: {printable(key)}: {warning}", file=sys.stderr)
        crops.append(crop)
    if len(problems) == 1:
        raise UserError(printable(problems[0]))
    if problems:
        raise combined_error(
            map(printable, problems), f"{len(problems)} of {counted(len(found), 'image')} cannot be shown"
        )
    return crops
