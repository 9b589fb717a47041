"""Short measurements before an extraction: channel statistics for int8 and int4, and images per second."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from llava_twophase.cache.codec import Channels, Codec
from llava_twophase.errors import UserError
from llava_twophase.extract.decode import DecodeDataset
from llava_twophase.extract.encode import TowerRunner
from llava_twophase.text import counted
from llava_twophase.vision.sources import ImageSource
from llava_twophase.vision.tower import VisionTower

logger = logging.getLogger(__name__)

SAMPLE_IMAGES = 128
SAMPLE_SEED = 0
_RATE_SECONDS = 5.0


@dataclass(frozen=True)
class Rates:
    """Images per second of one rank.

    Attributes:
        tower: Tower and codec.
        decode: Reading and decoding by all worker processes together.
    """

    tower: float
    decode: float

    @property
    def extraction(self) -> float:
        """The rate of an extraction: decoding and the tower overlap, so the slower one limits it."""
        return min(self.tower, self.decode)


def measure_channels(
    images: ImageSource, tower: VisionTower, keys: Sequence[str], batch_size: int, num_workers: int
) -> tuple[Channels, dict[str, Any]]:
    """Measure the mean and standard deviation of every channel on a seeded sample.

    Args:
        images: The source of image files; images that cannot be used are skipped.
        tower: The frozen vision tower.
        keys: Image keys of the records.
        batch_size: Images of one forward pass.
        num_workers: Worker processes that decode; 0 decodes in this process.

    Returns:
        The channels, and what the fingerprint records about them.

    Raises:
        UserError: No image of the sample can be used, or the tower's features are not finite.
    """
    picked = np.random.default_rng(SAMPLE_SEED).choice(len(keys), min(SAMPLE_IMAGES, len(keys)), replace=False)
    sample = [keys[position] for position in sorted(picked.tolist())]
    logger.info("measuring channels on %d of %s", len(sample), counted(len(keys), "image"))
    batches = [sample[start : start + batch_size] for start in range(0, len(sample), batch_size)]
    loader = DataLoader(DecodeDataset(images, tower.preprocessor, batches), batch_size=None, num_workers=num_workers)
    run_tower, used = TowerRunner(tower), 0

    def features() -> Iterator[torch.Tensor]:
        nonlocal used
        for batch in loader:
            if batch.keys:
                used += len(batch.keys)
                yield run_tower.features(batch.crops)

    channels = Channels.measure(features())
    if not used:
        raise UserError(f"none of {counted(len(sample), 'sampled image')} can be used, so int8 and int4 have no scales")
    if not np.isfinite([channels.mean, channels.std]).all():
        raise UserError("the tower's features are not finite; try --compute_dtype bf16 or fp32")
    return channels, {"sha256": channels.sha256(), "images": used, "seed": SAMPLE_SEED}


def measure_rates(
    images: ImageSource, tower: VisionTower, codec: Codec, keys: Sequence[str], batch_size: int, num_workers: int
) -> Rates | None:
    """Measure how fast one rank works, on the first batch; takes some seconds.

    Args:
        images: The source of image files.
        tower: The frozen vision tower.
        codec: Makes stored rows from features.
        keys: Image keys; the first ``batch_size`` of them are used.
        batch_size: Images of one forward pass.
        num_workers: Worker processes of the extraction.

    Returns:
        The rates; None if none of these images can be used.
    """
    dataset = DecodeDataset(images, tower.preprocessor, [keys[: max(1, batch_size)]])
    started = time.perf_counter()
    batch = dataset[0]
    decode_seconds = (time.perf_counter() - started) / max(1, len(batch.keys))
    if not batch.keys:
        return None
    return Rates(tower=_tower_rate(TowerRunner(tower, codec), batch.crops), decode=max(1, num_workers) / decode_seconds)


def _tower_rate(run_tower: TowerRunner, crops: torch.Tensor) -> float:
    count, spent, rate = 1, 0.0, 0.0
    # Batches grow up to a full one, which is run twice: the first run of a size includes one-time set-up.
    while spent < _RATE_SECONDS:
        started = time.perf_counter()
        run_tower(crops[:count]).numpy()
        seconds = time.perf_counter() - started
        spent += seconds
        rate = max(rate, count / seconds)
        count = min(4 * count, len(crops), max(1, int(rate * (_RATE_SECONDS - spent))))
    return rate
