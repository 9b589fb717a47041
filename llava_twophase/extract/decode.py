"""The work of phase one's worker processes: image keys to crops.

Shapes: B usable images of a batch, S side of the crop in pixels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from llava_twophase.cache.quarantine import Quarantined
from llava_twophase.cache.shard_writer import sha256
from llava_twophase.cpu import CpuMeter, CpuUsage
from llava_twophase.vision.images import OUT_OF_MEMORY, BadImage, decode_image
from llava_twophase.vision.precheck import find_bad_headers
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.sources import ImageSource


@dataclass
class DecodedBatch:
    """The result of decoding one batch of image keys.

    Attributes:
        keys: Keys of the usable images, B of them.
        crops: ``uint8 [B, S, S, 3]``.
        sources: Size in bytes and SHA-256 of each image file.
        bad: The images that cannot be used.
        high_bit_depth: Number of images with more than 8 bits per channel, whose values were clipped.
        read_seconds: Time spent reading files.
        decode_seconds: Time spent decoding, resizing and cropping.
        cpu: CPU time of the worker process; empty if there are no worker processes.
    """

    keys: list[str] = field(default_factory=list)
    crops: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    sources: list[tuple[int, bytes]] = field(default_factory=list)
    bad: list[Quarantined] = field(default_factory=list)
    high_bit_depth: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    cpu: CpuUsage = field(default_factory=CpuUsage)

    def pin_memory(self) -> DecodedBatch:
        """Move the crops to page-locked memory; called by the data loader."""
        self.crops = self.crops.pin_memory()
        return self


class DecodeDataset(Dataset[DecodedBatch]):
    """Decodes batches of image keys, in worker processes.

    Args:
        images: The source of image files.
        preprocessor: Makes the crops.
        batches: The image keys of each batch.
    """

    def __init__(self, images: ImageSource, preprocessor: Preprocessor, batches: Sequence[Sequence[str]]) -> None:
        self._images = images
        self._preprocessor = preprocessor
        self._batches = batches

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __getitem__(self, index: int) -> DecodedBatch:
        """Read, decode and crop one batch. A bad image is reported, never replaced by another one."""
        batch, meter = DecodedBatch(), CpuMeter()
        crops = [crop for key in self._batches[index] if (crop := self._decode(key, batch)) is not None]
        if crops:
            batch.crops = torch.from_numpy(np.stack(crops))  # [B, S, S, 3]
        if get_worker_info() is not None:
            batch.cpu = meter.usage(idle=batch.read_seconds)
        return batch

    def _decode(self, key: str, batch: DecodedBatch) -> np.ndarray | None:
        data, started = None, time.perf_counter()
        try:
            data = self._images.read(key)
            read = time.perf_counter()
            batch.read_seconds += read - started
            image, high_bit_depth = decode_image(data)
            crop = self._preprocessor.crop(image)
            batch.decode_seconds += time.perf_counter() - read
        except BadImage as error:
            batch.bad.append(quarantined(key, str(error), data))
            return None
        batch.high_bit_depth += high_bit_depth
        batch.keys.append(key)
        batch.sources.append((len(data), sha256(data)))
        return crop


def find_bad(images: ImageSource, keys: Sequence[str], num_workers: int) -> list[Quarantined]:
    """Find images that cannot be used, from the first bytes of each file; see ``find_bad_headers``."""
    return [Quarantined(key, reason) for key, reason in find_bad_headers(images, keys, num_workers).items()]


def still_bad(images: ImageSource, entries: Sequence[Quarantined]) -> set[str]:
    """Return the keys of quarantined images whose files have not changed since, or are still missing.

    Images for which there was not enough memory are not among them: they may fit now.
    """
    unchanged = set()
    for entry in entries:
        if OUT_OF_MEMORY in entry.reason:
            continue
        try:
            data = images.read(entry.key)
        except BadImage:
            data = None
        now = quarantined(entry.key, "", data)
        if (now.source_size, now.source_sha256) == (entry.source_size, entry.source_sha256):
            unchanged.add(entry.key)
    return unchanged


def quarantined(key: str, reason: str, data: bytes | None) -> Quarantined:
    """Make the quarantine entry of an image; ``data`` holds the file's bytes if they could be read."""
    if data is None:
        return Quarantined(key, reason)
    return Quarantined(key, reason, len(data), sha256(data).hex())
