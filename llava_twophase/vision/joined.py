"""Several vision towers that run as one: an image is cropped for each, and their features are joined on channels.

Shapes: B images; tower i takes crops of side S_i; N is the sum of S_i * S_i * 3; L tokens and D width of the joined
features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_twophase.joining import join_features, joined_fingerprint, joined_shape
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower


class JoinedPreprocessor:
    """Crops an image for several towers, each with its own image processor.

    Args:
        preprocessors: Those of the towers, in their order.
    """

    def __init__(self, preprocessors: Sequence[Preprocessor]) -> None:
        self.preprocessors = tuple(preprocessors)

    def crop(self, image: Image.Image) -> np.ndarray:
        """Crop an image for all towers.

        Returns:
            ``uint8 [N]``: the crops of all towers, one after another.

        Raises:
            BadImage: As ``Preprocessor.crop``.
        """
        return np.concatenate([preprocessor.crop(image).reshape(-1) for preprocessor in self.preprocessors])

    def split(self, crops: torch.Tensor) -> list[torch.Tensor]:
        """Return the crops of each tower, ``uint8 [B, S_i, S_i, 3]``, of ``uint8 [B, N]``."""
        shapes = [(preprocessor.image_size, preprocessor.image_size, 3) for preprocessor in self.preprocessors]
        parts = crops.split([height * width * channels for height, width, channels in shapes], dim=1)
        return [part.unflatten(1, shape).contiguous() for part, shape in zip(parts, shapes, strict=True)]


class JoinedTowers:
    """Several frozen towers with the interface of one.

    Args:
        towers: In the order of their channels.
        interpolate: Resample patch grids of other sizes to the first tower's, as ``join_features`` does.

    Attributes:
        preprocessor: Crops images for all towers.
        feature_shape: Tokens and width of one image's joined features.

    Raises:
        UserError: The numbers of tokens differ without ``interpolate``.
    """

    def __init__(self, towers: Sequence[VisionTower], interpolate: bool = False) -> None:
        self._towers, self._interpolate = tuple(towers), interpolate
        names = [f"--vision_tower {tower.name}" for tower in towers]
        self.feature_shape = joined_shape([tower.feature_shape for tower in towers], names, interpolate)
        self.preprocessor = JoinedPreprocessor([tower.preprocessor for tower in towers])

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all towers, on the device."""
        return sum(tower.weight_bytes for tower in self._towers)

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that changes a feature value; hashes the weights of all towers."""
        return joined_fingerprint([tower.fingerprint() for tower in self._towers], self._interpolate)

    def encode(self, crops: torch.Tensor) -> torch.Tensor:
        """Turn crops into joined features.

        Args:
            crops: ``uint8 [B, N]`` on any device.

        Returns:
            ``[B, L, D]`` on the towers' device, in their compute dtype if they have the same one and no grid is
            resampled.
        """
        parts = self.preprocessor.split(crops)
        return join_features([tower.encode(part) for tower, part in zip(self._towers, parts, strict=True)])
