"""Image keys to RGB pictures; knows nothing of processors, towers or caches."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from llava_twophase.errors import UserError, collected


class BadImage(Exception):
    """One picture that cannot be used, with the reason; what becomes of the run is the caller's policy."""


class ImageFolder:
    """Pictures as files below one folder.

    Args:
        root: The folder that image keys are relative to.

    Raises:
        UserError: It is not a folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"--image_folder {root} is not a folder")

    def read(self, key: str) -> bytes:
        """Read a picture's file.

        Raises:
            BadImage: It cannot be read, or it is empty.
        """
        try:
            data = (self.root / key).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from None
        if not data:
            raise BadImage("the file is empty")
        return data

    def require(self, keys: Sequence[str]) -> None:
        """Check that every picture is there, before any expensive work.

        Raises:
            UserError: Some are missing: all of them are counted, the first are named.
        """
        missing = [key for key in keys if not (self.root / key).is_file()]
        if missing:
            raise collected(missing, f"{len(missing)} of {len(keys)} images are missing in --image_folder {self.root}")


def decode(data: bytes) -> Image.Image:
    """Decode a picture exactly as LLaVA does: by content, ``convert("RGB")`` and nothing else.

    Alpha is dropped, EXIF orientation ignored, the first frame of an animation taken, 16-bit grey clipped.

    Args:
        data: The file's bytes.

    Returns:
        An RGB picture, fully decoded.

    Raises:
        BadImage: It is no picture, truncated, or beyond Pillow's decompression-bomb limit.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of palettes with transparency and of large pictures, once an image: noise at 558K images.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(f"cannot be decoded: {error}") from None
