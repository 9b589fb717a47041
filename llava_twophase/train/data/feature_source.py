"""`FeatureSource`: what gives a training run its patch features, whether from a cache or from the vision tower.

Shapes: B samples, L patch tokens, D tower width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llava_twophase.records import Records
from llava_twophase.train.data.prefetch import Batch, PrefetchDataset

if TYPE_CHECKING:
    from PIL import Image

Collate = Callable[[list[Any]], Batch]
Tokenize = Callable[[int], dict[str, torch.Tensor]]


class FeatureSource(Protocol):
    """Gives the features of images, read from a cache or computed in the training step."""

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """The fingerprint of the feature cache or of the joined caches, None without a cache."""

    @property
    def identity(self) -> Any:
        """A JSON value that is equal for two runs whose features are equal."""

    @property
    def encode(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Turn the crops of samples into ``[B, L, D]`` in the training step; None where samples have features."""

    @property
    def tower_bytes(self) -> int:
        """Bytes of the vision tower's weights on the device; 0 where samples have features."""

    def usable(self, records: Records) -> Records:
        """Return the records to train on: without those of quarantined images if the user asks for it.

        Raises:
            UserError: No record remains.
        """

    def require(self, keys: Sequence[str]) -> None:
        """Check that every image has features or can have them.

        Raises:
            UserError: Some do not; all are counted and the first are listed.
        """

    def load(self) -> tuple[int, int]:
        """Get ready to give features, and return their shape: tokens and width of one image."""

    def sample(self, key: str) -> dict[str, torch.Tensor]:
        """Return ``features [L, D]`` or ``crops``, uint8, of one image.

        Raises:
            UserError: The image cannot be used.
        """

    def read(self, keys: Sequence[str], device: torch.device) -> torch.Tensor:
        """Return the features of some images, ``[B, L, D]`` on the device."""

    def thumbnails(self, keys: Sequence[str]) -> list[Image.Image] | None:
        """Return small pictures of some images for an HTML page; None if the images are not at hand."""

    def prefetch(
        self,
        tokenize: Tokenize,
        collate: Collate,
        keys: Sequence[str],
        batch_size: int,
        batches_in_use: int,
        device: torch.device,
    ) -> PrefetchDataset | None:
        """Return a dataset that reads batches ahead of training; None where data loader workers do it.

        Args:
            tokenize: Returns ``input_ids`` and ``labels`` of a sample.
            collate: Makes a batch of samples.
            keys: The image key of each sample.
            batch_size: Largest batch.
            batches_in_use: Batches that training uses at the same time.
            device: Where batches go.
        """

    def close(self) -> None:
        """Give up what is being read ahead of training, which ended."""
