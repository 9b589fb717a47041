"""What the worker processes of phase one do: image keys to crops; knows nothing of towers or shards.

Shapes: B images of a batch that can be used, S the crop's side.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava_twophase.cache.quarantine import Quarantined
from llava_twophase.cache.shard_writer import sha256
from llava_twophase.vision.images import BadImage, Images, check_header, decode_noting_depth
from llava_twophase.vision.preprocess import Preprocessor

_CHECKED_AT_ONCE = 256


@dataclass
class Crops:
    """What a worker makes of one batch of image keys.

    Attributes:
        keys: The image keys that can be used, B of them.
        pixels: ``uint8 [B, S, S, 3]``.
        sources: Size in bytes and SHA-256 of each image file.
        bad: The images that cannot be used.
        deep: How many pictures had more than 8 bits a channel, which clip.
        read_seconds: Time spent reading files.
        decode_seconds: Time spent decoding, resizing and cropping.
    """

    keys: list[str] = field(default_factory=list)
    pixels: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    sources: list[tuple[int, bytes]] = field(default_factory=list)
    bad: list[Quarantined] = field(default_factory=list)
    deep: int = 0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0

    def pin_memory(self) -> Crops:
        """Move the pixels to memory that the device can fetch from by itself; the loader calls this."""
        self.pixels = self.pixels.pin_memory()
        return self


class CropDataset(Dataset[Crops]):
    """Batches of image keys to crops, in worker processes.

    Args:
        images: Where the pictures are.
        preprocessor: Makes the crops.
        batches: The image keys of each batch.
    """

    def __init__(self, images: Images, preprocessor: Preprocessor, batches: Sequence[Sequence[str]]) -> None:
        self._images, self._preprocessor, self._batches = images, preprocessor, batches

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __getitem__(self, index: int) -> Crops:
        """Read, decode and crop one batch; a bad picture is reported, never replaced."""
        crops, pixels = Crops(), []
        for key in self._batches[index]:
            data, started = None, time.perf_counter()
            try:
                data = self._images.read(key)
                read = time.perf_counter()
                crops.read_seconds += read - started
                picture, deep = decode_noting_depth(data)
                pixels.append(self._preprocessor.crop(picture))
                crops.decode_seconds += time.perf_counter() - read
            except BadImage as error:
                crops.bad.append(quarantined(key, str(error), data))
                continue
            crops.deep += deep
            crops.keys.append(key)
            crops.sources.append((len(data), sha256(data)))
        if pixels:
            crops.pixels = torch.from_numpy(np.stack(pixels))  # [B, S, S, 3]
        return crops


class _HeaderDataset(Dataset[list[Quarantined]]):
    def __init__(self, images: Images, keys: Sequence[str]) -> None:
        self._images, self._keys = images, keys

    def __len__(self) -> int:
        return -(-len(self._keys) // _CHECKED_AT_ONCE)

    def __getitem__(self, index: int) -> list[Quarantined]:
        bad = []
        for key in self._keys[index * _CHECKED_AT_ONCE : (index + 1) * _CHECKED_AT_ONCE]:
            try:
                with self._images.open(key) as file:
                    check_header(file)
            except BadImage as error:
                bad.append(Quarantined(key, str(error)))
        return bad


def find_bad(images: Images, keys: Sequence[str], num_workers: int) -> list[Quarantined]:
    """Find the images that cannot be used, as far as a look at the beginning of each file tells.

    Args:
        images: Where the pictures are.
        keys: Image keys.
        num_workers: Worker processes; 0 looks in this one.

    Returns:
        Missing, empty and foreign files, and pictures too large to decode, in the order of ``keys``. A file that is
        cut short or damaged further on is found only when it is decoded.
    """
    workers = min(num_workers, len(keys) // (4 * _CHECKED_AT_ONCE))  # a few are looked at before workers have started
    loader = DataLoader(_HeaderDataset(images, keys), batch_size=None, num_workers=workers)
    return [bad for batch in loader for bad in batch]


def still_bad(images: Images, entries: Sequence[Quarantined]) -> set[str]:
    """Tell which quarantined images have the same file as then, byte for byte, or still none."""
    same = set()
    for entry in entries:
        try:
            data = images.read(entry.key)
        except BadImage:
            data = None
        now = quarantined(entry.key, "", data)
        if (now.source_size, now.source_sha256) == (entry.source_size, entry.source_sha256):
            same.add(entry.key)
    return same


def quarantined(key: str, reason: str, data: bytes | None) -> Quarantined:
    """Make the quarantine's entry of an image, from its file's bytes where they could be read."""
    if data is None:
        return Quarantined(key, reason)
    return Quarantined(key, reason, len(data), sha256(data).hex())
