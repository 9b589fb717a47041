"""Patch features of images for a trained projector: from a feature cache, else from the vision tower.

Shapes: B images, S side of the crop, L patch tokens, D tower width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from llava_twophase.cache.joined import AnyCache, caches_of
from llava_twophase.deploy.trained_projector import TrainedProjector
from llava_twophase.errors import UserError
from llava_twophase.train.data.on_the_fly import load_towers
from llava_twophase.train.data.tower_check import check_all_settings
from llava_twophase.vision.images import BadImage, decode
from llava_twophase.vision.joined import JoinedTowers
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.sources import ImageFolder
from llava_twophase.vision.tower import VisionTower

ImageInput = str | Path | bytes | Image.Image
"""A path or an image key of the cache, the bytes of an image file, or a PIL image."""


class ImageFeatures:
    """Gives the features that a projector was trained on.

    Args:
        projector: The trained projector.
        device: Where the tower runs, and where features go.
        cache: Cache whose images are not encoded; for several towers, the joined caches of all.

    Raises:
        UserError: A cache was made with a tower or settings that differ from the projector's, or there is not one for
            each tower.
    """

    def __init__(self, projector: TrainedProjector, device: torch.device, cache: AnyCache | None = None) -> None:
        self._projector = projector
        self._device = device
        self.cache = cache
        self._tower: VisionTower | JoinedTowers | None = None
        if cache is not None:
            check_all_settings(caches_of(cache), projector.tower_settings)
            self._require_shape(cache.feature_shape)

    def has(self, key: str) -> bool:
        """Return whether the cache has an image, so that the tower is not needed for it."""
        return self.cache is not None and key in self.cache

    def prepare(self, image: ImageInput) -> torch.Tensor:
        """Read one image.

        Returns:
            Its row of the cache, ``[L, D]``, or its crop, ``uint8 [S, S, 3]``, for ``encode``; for joined towers the
            crops of all, ``uint8 [N]``.

        Raises:
            UserError: The image cannot be used.
        """
        if self.cache is not None and isinstance(image, str) and image in self.cache:
            return self.cache.read_tensor([image])[0].float()
        try:
            return torch.from_numpy(self._load_tower().preprocessor.crop(open_image(image)))
        except BadImage as error:
            raise UserError(f"{image if isinstance(image, (str, Path)) else 'the image'}: {error}") from None

    def encode(self, prepared: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the features of prepared images, float32 ``[B, L, D]``; the tower runs once for all crops."""
        crops = [tensor for tensor in prepared if tensor.dtype == torch.uint8]
        encoded = iter(self._load_tower().encode(torch.stack(crops)).float() if crops else ())
        rows = [next(encoded) if tensor.dtype == torch.uint8 else tensor.to(self._device) for tensor in prepared]
        return torch.stack(rows)

    def _load_tower(self) -> VisionTower | JoinedTowers:
        if self._tower is None:
            projector = self._projector
            self._tower = load_towers(
                projector.tower_settings,
                [
                    Preprocessor(tower, projector.image_aspect_ratio, projector.s2_scales)
                    for tower in projector.vision_towers
                ],
                [getattr(torch, dtype or "float32") for dtype in projector.tower_dtypes],
                self._device,
                projector.interpolate_patch_grid,
            )
            self._require_shape(self._tower.feature_shape)
        return self._tower

    def _require_shape(self, found: tuple[int, int]) -> None:
        # A projector of LLaVA takes any number of patches.
        spec = self._projector.spec
        if spec is not None and found != (spec.patches, spec.tower_width):
            raise UserError(
                f"{self._projector.path} takes {spec.patches} patch features of width {spec.tower_width}, found "
                f"{found[0]} of width {found[1]}; give the vision tower that it was trained with"
            )


def open_image(image: ImageInput) -> Image.Image:
    """Decode an image as training does.

    Raises:
        BadImage: It cannot be read or decoded.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    return decode(image if isinstance(image, bytes) else read_image_file(Path(image)))


def read_image_file(path: Path) -> bytes:
    """Read an image file with the limits of an image folder: no device, no pipe, no file of another kind.

    Raises:
        BadImage: It cannot be read.
    """
    try:
        return ImageFolder(path.parent).read(path.name)
    except UserError:  # its folder does not exist
        raise BadImage("cannot be read: No such file or directory") from None
