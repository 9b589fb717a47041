"""Features computed in the training step, as LLaVA does: the baseline for parity tests and benchmarks.

Data loader workers decode the images; the vision tower, or several joined ones, runs in the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from llava_twophase.cpu import available_cpus
from llava_twophase.errors import UserError
from llava_twophase.records import Records
from llava_twophase.train.data.tower_check import TowerSettings
from llava_twophase.vision.images import BadImage, decode
from llava_twophase.vision.joined import JoinedPreprocessor, JoinedTowers
from llava_twophase.vision.precheck import require_images
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.sources import ImageSource, open_images
from llava_twophase.vision.tower import VisionTower

if TYPE_CHECKING:
    from llava_twophase.train.data.feature_source import Collate, Tokenize


class OnTheFlyFeatures:
    """The ``FeatureSource`` of a run without a cache.

    Args:
        image_folder: Folder, zip or uncompressed tar of the images.
        settings: Which towers, and what of their output is used; several are joined on channels.
        dtypes: The compute dtype of each tower.
        device: Where the towers run.
        interpolate: Resample patch grids of other sizes to the first tower's.

    Raises:
        UserError: The images or an image processor cannot be read.
    """

    def __init__(
        self,
        image_folder: str,
        settings: Sequence[TowerSettings],
        dtypes: Sequence[torch.dtype],
        device: torch.device | str,
        interpolate: bool = False,
    ) -> None:
        self._settings = tuple(settings)
        self._dtypes = dtypes
        self._device = device
        self._interpolate = interpolate
        self._images, self._image_folder = open_images(image_folder), image_folder
        self._preprocessors = [
            Preprocessor(part.vision_tower, part.image_aspect_ratio, part.s2_scales) for part in self._settings
        ]
        self._tower: VisionTower | JoinedTowers | None = None

    @property
    def fingerprint(self) -> None:
        """None: there is no cache."""
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """The fingerprint of the towers; ``load`` comes first."""
        assert self._tower is not None, "load() comes first"
        return {"on_the_fly": self._tower.fingerprint()}

    @property
    def encode(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Turn ``uint8 [B, S, S, 3]`` (joined towers: ``[B, N]``) into features ``[B, L, D]``; no gradient."""
        return self._encode

    @property
    def tower_bytes(self) -> int:
        """Bytes of the tower's weights on the device; ``load`` comes first."""
        assert self._tower is not None, "load() comes first"
        return self._tower.weight_bytes

    def usable(self, records: Records) -> Records:
        """Return all records: there is no quarantine without a cache."""
        return records

    def require(self, keys: Sequence[str]) -> None:
        """Check that every image has a usable file, from the first bytes of each.

        Raises:
            UserError: Some have not; all are counted and the first are listed.
        """
        require_images(self._images, keys, self._image_folder, min(8, available_cpus()))

    def load(self) -> tuple[int, int]:
        """Load the towers and return their feature shape: tokens and width of one image."""
        self._tower = load_towers(
            self._settings,
            self._preprocessors,
            self._dtypes,
            self._device,
            self._interpolate,
        )
        return self._tower.feature_shape

    def sample(self, key: str) -> dict[str, torch.Tensor]:
        """Decode one image to ``crops uint8 [S, S, 3]`` (joined towers: ``[N]``), in a data loader worker.

        Raises:
            UserError: It cannot be used.
        """
        return {"crops": self._crop(key)}

    def read(self, keys: Sequence[str], device: torch.device) -> torch.Tensor:
        """Return the features of some images, ``[B, L, D]`` on the device."""
        return self._encode(torch.stack([self._crop(key) for key in keys])).to(device)

    def thumbnails(self, keys: Sequence[str]) -> list[Image.Image]:
        """Return small pictures of some images."""
        return Thumbnails(self._images).read(keys)

    def prefetch(
        self,
        tokenize: Tokenize,
        collate: Collate,
        keys: Sequence[str],
        batch_size: int,
        batches_in_use: int,
        device: torch.device,
    ) -> None:
        """Return None: data loader workers read ahead."""
        return None

    def close(self) -> None:
        """Do nothing: HF Trainer ends its data loader workers."""

    def _crop(self, key: str) -> torch.Tensor:
        try:
            return torch.from_numpy(join_preprocessors(self._preprocessors).crop(decode(self._images.read(key))))
        except BadImage as error:
            raise UserError(f"image {key}: {error}; fix the image, or remove its record") from None

    def _encode(self, crops: torch.Tensor) -> torch.Tensor:
        assert self._tower is not None, "load() comes first"
        return self._tower.encode(crops).clone()  # a clone, since autograd refuses inference tensors

    def __getstate__(self) -> dict[str, object]:
        """Pickle everything except the tower; a data loader worker only decodes images."""
        return {**self.__dict__, "_tower": None}


def join_preprocessors(preprocessors: Sequence[Preprocessor]) -> Preprocessor | JoinedPreprocessor:
    """Return one preprocessor for all towers; that of one tower itself."""
    return preprocessors[0] if len(preprocessors) == 1 else JoinedPreprocessor(preprocessors)


def load_towers(
    settings: Sequence[TowerSettings],
    preprocessors: Sequence[Preprocessor],
    dtypes: Sequence[torch.dtype],
    device: torch.device | str,
    interpolate: bool,
) -> VisionTower | JoinedTowers:
    """Load a tower, or several to run as one.

    Args:
        settings: Which towers, and what of their output is used.
        preprocessors: The preprocessor of each tower.
        dtypes: The compute dtype of each tower.
        device: Where the towers run.
        interpolate: Resample patch grids of other sizes to the first tower's.

    Raises:
        UserError: A tower cannot be loaded, or the numbers of tokens differ without ``interpolate``.
    """
    towers = [
        VisionTower(
            name=part.vision_tower,
            preprocessor=preprocessor,
            select_layer=part.select_layer,
            select_feature=part.select_feature,
            dtype=dtype,
            device=device,
        )
        for part, preprocessor, dtype in zip(settings, preprocessors, dtypes, strict=True)
    ]
    return towers[0] if len(towers) == 1 else JoinedTowers(towers, interpolate)


class Thumbnails:
    """Reads small pictures of images, for pages that people look at.

    Args:
        images: Where the images are; opened once, since a zip of 558K images takes seconds to open.
    """

    def __init__(self, images: ImageSource) -> None:
        self._images = images

    @classmethod
    def open(cls, image_folder: str) -> Thumbnails:
        """Open a folder, zip or uncompressed tar of images.

        Raises:
            UserError: It cannot be read.
        """
        return cls(open_images(image_folder))

    def read(self, keys: Sequence[str], side: int = 128) -> list[Image.Image]:
        """Return pictures of at most ``side`` pixels; a grey square for an image that cannot be used."""
        return [self._read(key, side) for key in keys]

    def _read(self, key: str, side: int) -> Image.Image:
        try:
            picture = decode(self._images.read(key))
        except BadImage:
            return Image.new("RGB", (side, side), "grey")
        picture.thumbnail((side, side))
        return picture
