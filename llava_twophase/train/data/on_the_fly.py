"""LLaVA's way, the baseline: pictures decoded by the data loader and the vision tower inside the step."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image

from llava_twophase.errors import UserError
from llava_twophase.vision.images import BadImage, decode, open_images, require
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower


class OnTheFly:
    """Where features come from when there is no cache.

    Args:
        image_folder: Folder, zip or uncompressed tar of the pictures.
        vision_tower: Hub id or folder of the tower.
        image_aspect_ratio: ``square`` or ``pad``.

    Raises:
        UserError: Folder or processor cannot be loaded.
    """

    def __init__(self, image_folder: str, vision_tower: str, image_aspect_ratio: str) -> None:
        self._name = vision_tower
        self._images, self._image_folder = open_images(image_folder), image_folder
        self._preprocessor = Preprocessor(vision_tower, image_aspect_ratio)
        self._tower: VisionTower | None = None

    def require(self, keys: Sequence[str]) -> None:
        """Check that all pictures are there, before the LLM is loaded."""
        require(self._images, keys, self._image_folder)

    def load_tower(
        self, select_layer: int, select_feature: str, dtype: torch.dtype, device: torch.device | str
    ) -> tuple[int, int]:
        """Load the tower and return its feature shape, tokens and width."""
        self._tower = VisionTower(self._name, self._preprocessor, select_layer, select_feature, dtype, device)
        return self._tower.feature_shape

    def crop(self, key: str) -> torch.Tensor:
        """Decode one picture to ``uint8 [S, S, 3]``, in a data loader's worker.

        Raises:
            UserError: It cannot be used.
        """
        try:
            return torch.from_numpy(self._preprocessor.crop(decode(self._images.read(key))))
        except BadImage as error:
            raise UserError(f"image {key}: {error}; mend it or remove its record") from None

    def encode(self, crops: torch.Tensor) -> torch.Tensor:
        """Turn ``uint8 [B, S, S, 3]`` into features ``[B, L, D]`` in the tower's dtype; no gradient."""
        assert self._tower is not None, "load_tower comes first"
        return self._tower.encode(crops).clone()  # a clone, since autograd refuses inference tensors

    def __getstate__(self) -> dict[str, object]:
        """Leave the tower behind when pickled to a data loader's worker."""
        return {**self.__dict__, "_tower": None}


def thumbnail(image_folder: str, key: str, side: int = 128) -> bytes:
    """Make a small JPEG of one picture, for pages that people look at.

    Args:
        image_folder: Folder, zip or uncompressed tar of the pictures.
        key: Image key.
        side: Longest side in pixels.

    Returns:
        The JPEG's bytes; of a grey square where the picture cannot be used.
    """
    try:
        picture = decode(open_images(image_folder).read(key))
    except BadImage:
        picture = Image.new("RGB", (side, side), "grey")
    picture.thumbnail((side, side))
    picture.save(buffer := io.BytesIO(), "JPEG", quality=85)
    return buffer.getvalue()
