"""``show``: pictures beside their patch features, as one PNG."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from llava_twophase.errors import UserError
from llava_twophase.inspection import output, pictures
from llava_twophase.inspection.rows import Rows
from llava_twophase.text import printable
from llava_twophase.vision.images import BadImage, Images, decode, open_images


def run(args: argparse.Namespace) -> int:
    """Draw the images that were named."""
    rows = Rows(args.cache)
    found = np.array([rows.find(key) for key in args.keys])
    images = open_images(args.image_folder)
    crops = []
    for key, row in zip(args.keys, found.tolist(), strict=True):
        try:
            crop, same = seen(rows, images, row, args.size)
        except BadImage as error:
            raise UserError(f"{Path(args.image_folder) / key} {error}") from None
        if not same:
            print(f"warning: {printable(key)} is not the file that the features were made from", file=sys.stderr)
        crops.append(crop)
    maps = pictures.draw_maps(rows.values(found), rows.cache.fingerprint, args.patch)
    drawn = pictures.sheet(crops, args.keys, maps, args.patch, args.size)
    output.write_file(args.output, lambda file: drawn.save(file, format="PNG"))
    output.print_line(f"wrote {args.output}: {', '.join(args.keys)}", output.console())
    return 0


def seen(rows: Rows, images: Images, row: int, size: int) -> tuple[Image.Image, bool]:
    """Return what the tower saw of an image, to look at, and whether the file is still the same.

    Args:
        rows: The cache.
        images: Where pictures come from.
        row: The image.
        size: Side of the crop in pixels.

    Raises:
        BadImage: It cannot be read or decoded.
    """
    data = images.read(rows.keys([row])[0])
    same = hashlib.sha256(data).digest() == rows.digest(row)
    return pictures.crop(decode(data), rows.cache.fingerprint, size), same
