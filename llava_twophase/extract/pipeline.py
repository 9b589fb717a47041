"""Phase one's loop: decode workers -> tower -> writer, all three busy at once; knows nothing of records or flags."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader

from llava_twophase.cache.shard_writer import ShardSpec
from llava_twophase.errors import UserError, combined_error
from llava_twophase.extract.decode import CropDataset, Crops
from llava_twophase.extract.encode import Encoder
from llava_twophase.extract.plan import ShardWork
from llava_twophase.extract.sealing import Sealed, ShardQueue
from llava_twophase.extract.stage_times import StageTimes
from llava_twophase.vision.images import Images
from llava_twophase.vision.tower import VisionTower


@dataclass(frozen=True)
class Options:
    """How a rank works, none of which changes what a full batch's rows hold.

    Attributes:
        batch_size: Images of one forward pass.
        num_workers: Worker processes that decode; 0 decodes in this one.
        skip_bad: Whether images that cannot be used are left out; else they end the run.
    """

    batch_size: int
    num_workers: int
    skip_bad: bool = False


@dataclass(frozen=True)
class Step:
    """One batch further.

    Attributes:
        images: Images of the batch, used or left out.
        bad: How many were left out.
        deep: How many had more than 8 bits a channel, which clip.
        sealed: Shards sealed meanwhile.
    """

    images: int
    bad: int
    deep: int
    sealed: list[Sealed]


def extract(
    cache: Path,
    work: Sequence[ShardWork],
    images: Images,
    tower: VisionTower,
    spec: ShardSpec,
    options: Options,
    times: StageTimes,
) -> Iterator[Step]:
    """Encode the planned shards and seal them one after another.

    Batches never cross shards, and an image that is left out is not replaced by the next one: so what a row holds does
    not depend on which shards this run still had to write.

    Args:
        cache: The cache's directory.
        work: The shards of this rank.
        images: Where the pictures are.
        tower: The frozen vision tower.
        spec: What all shards share.
        options: How to work.
        times: Where the time goes is added up here.

    Yields:
        What each batch brought; the last one when all shards are sealed.

    Raises:
        UserError: An image cannot be used, or its features are not finite; sealed shards stay.
        OSError: A shard cannot be written; sealed shards stay.
    """
    started = time.perf_counter()
    encoder = Encoder(tower, spec.codec)
    with ShardQueue(cache, spec, options.skip_bad, times) as queue:
        for shard, keys, crops in _crops(work, images, tower, options, times):
            if crops.bad and not options.skip_bad:
                raise _unusable(crops)
            queue.leave_out(shard, crops.bad)
            rows = encoder(crops.pixels) if crops.keys else None
            queue.append(shard, crops.keys, crops.sources, rows)
            if keys[-1] == shard.keys[-1]:
                queue.finish(shard)
            yield Step(len(keys), len(crops.bad), crops.deep, queue.sealed())
        last = queue.sealed(wait=True)
    times.total += time.perf_counter() - started
    yield Step(0, 0, 0, last)


def _crops(
    work: Sequence[ShardWork], images: Images, tower: VisionTower, options: Options, times: StageTimes
) -> Iterator[tuple[ShardWork, Sequence[str], Crops]]:
    size = options.batch_size
    batches = [(shard, shard.keys[start : start + size]) for shard in work for start in range(0, len(shard.keys), size)]
    if batches:
        images.prepare()
    loader = DataLoader(
        CropDataset(images, tower.preprocessor, [keys for _, keys in batches]),
        batch_size=None,
        num_workers=options.num_workers if batches else 0,
        pin_memory=tower.device.type == "cuda",
    )
    arriving = iter(loader)
    for shard, keys in batches:
        started = time.perf_counter()
        crops = _next(arriving)
        times.starved += time.perf_counter() - started
        times.read += crops.read_seconds
        times.decode += crops.decode_seconds
        yield shard, keys, crops


def _next(arriving: Iterator[Crops]) -> Crops:
    try:
        return next(arriving)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a worker process that decodes pictures died ({error}); it may have run out of memory or of /dev/shm: "
            "run the same command again with a lower --num_workers or --batch_size"
        ) from None


def _unusable(crops: Crops) -> UserError:
    return combined_error(
        [f"{bad.key}: {bad.reason}" for bad in crops.bad],
        "images that cannot be used; mend them, remove their records, or leave them out with --on_bad_image skip",
    )
