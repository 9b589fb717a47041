"""Channel statistics for int8 and int4, from a seeded sample of the images, before any features are written."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from llava_twophase.cache.codec import Channels
from llava_twophase.errors import UserError
from llava_twophase.extract.decode import CropDataset
from llava_twophase.vision.images import Images
from llava_twophase.vision.tower import VisionTower

logger = logging.getLogger(__name__)

SAMPLE_IMAGES = 128
SAMPLE_SEED = 0


def measure_channels(
    images: Images, tower: VisionTower, keys: Sequence[str], batch_size: int, num_workers: int
) -> tuple[Channels, dict[str, Any]]:
    """Measure the mean and std of every channel.

    Args:
        images: Where the pictures are; those that cannot be used are left out.
        tower: The frozen vision tower.
        keys: Image keys of the records.
        batch_size: Images of one forward pass.
        num_workers: Worker processes that decode; 0 decodes in this one.

    Returns:
        The channels, and what the fingerprint says of them.

    Raises:
        UserError: No image of the sample can be used, or the tower's features are not finite.
    """
    picked = np.random.default_rng(SAMPLE_SEED).choice(len(keys), min(SAMPLE_IMAGES, len(keys)), replace=False)
    sample = [keys[position] for position in sorted(picked.tolist())]
    logger.info("measuring channels on %d of %d images", len(sample), len(keys))
    batches = [sample[start : start + batch_size] for start in range(0, len(sample), batch_size)]
    loader = DataLoader(CropDataset(images, tower.preprocessor, batches), batch_size=None, num_workers=num_workers)
    used = 0

    def features() -> Iterator[torch.Tensor]:
        nonlocal used
        for crops in loader:
            if len(crops.pixels):
                used += len(crops.pixels)
                yield tower.encode(crops.pixels)

    channels = Channels.measure(features())
    if not used:
        raise UserError(f"none of {len(sample)} sampled images can be used, so int8 and int4 have nothing to go by")
    if not np.isfinite([channels.mean, channels.std]).all():
        raise UserError("the tower's features are not finite; try --compute_dtype bf16 or fp32")
    return channels, {"sha256": channels.sha256(), "images": used, "seed": SAMPLE_SEED}
