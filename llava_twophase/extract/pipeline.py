"""Phase one's loop: decode workers -> tower -> writer, all three busy at once; knows nothing of records or flags.

Shapes: B images of a batch, S the crop's side, L tokens, D width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava_twophase.cache.manifest import ShardEntry
from llava_twophase.cache.writer import ShardSpec, ShardWriter, sha256
from llava_twophase.errors import UserError
from llava_twophase.extract.plan import ShardWork, shard_path
from llava_twophase.vision.images import BadImage, ImageFolder, decode
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower

logger = logging.getLogger(__name__)

_WRITES_IN_FLIGHT = 2


@dataclass
class Crops:
    """What a worker makes of one batch of image keys.

    Attributes:
        pixels: ``uint8 [B, S, S, 3]``.
        sources: Size in bytes and SHA-256 of each image file.
        bad: Key and reason of each image that could not be used.
    """

    pixels: torch.Tensor
    sources: list[tuple[int, bytes]]
    bad: list[str]


class CropDataset(Dataset[Crops]):
    """Batches of image keys to crops, in worker processes.

    Args:
        images: Where the pictures are.
        preprocessor: Makes the crops.
        batches: The image keys of each batch.
    """

    def __init__(self, images: ImageFolder, preprocessor: Preprocessor, batches: Sequence[Sequence[str]]) -> None:
        self._images, self._preprocessor, self._batches = images, preprocessor, batches

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __getitem__(self, index: int) -> Crops:
        """Read, decode and crop one batch; a bad picture is reported, never replaced."""
        crops, sources, bad = [], [], []
        for key in self._batches[index]:
            try:
                data = self._images.read(key)
                crops.append(self._preprocessor.crop(decode(data)))
                sources.append((len(data), sha256(data)))
            except BadImage as error:
                bad.append(f"{key}: {error}")
        pixels = torch.from_numpy(np.stack(crops)) if crops else torch.empty(0)  # [B, S, S, 3]
        return Crops(pixels, sources, bad)


def extract(
    cache: Path,
    work: Sequence[ShardWork],
    images: ImageFolder,
    tower: VisionTower,
    spec: ShardSpec,
    batch_size: int,
    num_workers: int,
) -> Iterator[ShardEntry]:
    """Encode the planned shards and seal them one after another.

    Batches never cross shards, so what a row holds does not depend on which shards this run still had to write.

    Args:
        cache: The cache's directory.
        work: The shards of this rank.
        images: Where the pictures are.
        tower: The frozen vision tower.
        spec: What all shards share.
        batch_size: Images of one forward pass.
        num_workers: Worker processes that decode; 0 decodes in this one.

    Yields:
        The entry of each shard, once it is sealed.

    Raises:
        UserError: An image cannot be used, or its features are not finite; sealed shards stay.
    """
    batches = [
        (shard, shard.keys[start : start + batch_size])
        for shard in work
        for start in range(0, len(shard.keys), batch_size)
    ]
    dataset = CropDataset(images, tower.preprocessor, [keys for _, keys in batches])
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, pin_memory=tower.device.type == "cuda")
    codec = spec.codec
    total = sum(len(shard.keys) for shard in work)
    with tqdm(total=total, unit="img", desc="features", disable=None) as bar, _Writer() as writer:
        for (shard, keys), crops in zip(batches, loader, strict=True):
            if crops.bad:
                raise UserError("\n  ".join(["images that cannot be used; mend or remove their records:", *crops.bad]))
            if writer.shard is not shard:
                writer.start(shard, ShardWriter(shard_path(cache, shard.number), shard.keys, spec))
            writer.append(codec.encode(tower.encode(crops.pixels)).cpu().numpy(), crops.sources)
            bar.update(len(keys))
            if shard.keys[-1] == keys[-1]:
                yield writer.seal()


class _Writer:
    # Writes and hashes in a thread of its own, while the tower works on the next batch.

    def __init__(self) -> None:
        self.shard: ShardWork | None = None
        self._writer: ShardWriter | None = None
        self._thread = ThreadPoolExecutor(1, "writer")
        self._pending: list[Future[None]] = []
        self._started = 0.0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        if self._writer is not None:
            self._writer.discard()

    def start(self, shard: ShardWork, writer: ShardWriter) -> None:
        self.shard, self._writer, self._started = shard, writer, time.perf_counter()

    def append(self, raw: np.ndarray, sources: Sequence[tuple[int, bytes]]) -> None:
        assert self._writer is not None
        self._pending.append(self._thread.submit(self._writer.append, raw, sources))
        while len(self._pending) > _WRITES_IN_FLIGHT:
            self._pending.pop(0).result()

    def seal(self) -> ShardEntry:
        assert self._writer is not None
        while self._pending:
            self._pending.pop(0).result()
        entry = self._writer.seal()
        self.shard = self._writer = None
        seconds = time.perf_counter() - self._started
        logger.info("sealed %s: %d images, %.1f images/s", entry.file, entry.rows, entry.rows / seconds)
        return entry
