"""Phase one's loop: decode workers, tower and shard writer, all busy at the same time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from llava_twophase.cache.shard_writer import ShardSpec
from llava_twophase.cpu import CpuMeter, CpuUsage
from llava_twophase.errors import UserError, combined_error
from llava_twophase.extract.decode import DecodeDataset, DecodedBatch
from llava_twophase.extract.encode import TowerRunner
from llava_twophase.extract.plan import ShardWork
from llava_twophase.extract.sealing import Sealed, ShardQueue
from llava_twophase.extract.timings import Timings
from llava_twophase.vision.sources import ImageSource
from llava_twophase.vision.tower import VisionTower

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How a rank works. No option changes the stored rows of a full batch.

    Attributes:
        batch_size: Images of one forward pass.
        num_workers: Worker processes that decode; 0 decodes in this process.
        skip_bad: Whether images that cannot be used are skipped; otherwise they end the run.
    """

    batch_size: int
    num_workers: int
    skip_bad: bool = False


@dataclass(frozen=True)
class Step:
    """The result of one batch.

    Attributes:
        images: Images of the batch, usable or skipped.
        bad: Number of skipped images.
        high_bit_depth: Number of images with more than 8 bits per channel, whose values were clipped.
        sealed: Shards sealed since the previous step.
    """

    images: int
    bad: int
    high_bit_depth: int
    sealed: list[Sealed]


def extract(
    cache: Path,
    work: Sequence[ShardWork],
    images: ImageSource,
    tower: VisionTower,
    spec: ShardSpec,
    options: Options,
    timings: Timings,
) -> Iterator[Step]:
    """Encode the planned shards and seal them one after another.

    Batches never cross shards, and a skipped image is not replaced by the next one. So a row's values do not depend on
    which shards this run had to write.

    Args:
        cache: The cache's directory.
        work: The shards of this rank.
        images: The source of image files.
        tower: The frozen vision tower.
        spec: What all shards share.
        options: How to work.
        timings: The time of each step is added to it.

    Yields:
        The result of each batch; the last one when all shards are sealed.

    Raises:
        UserError: An image cannot be used, or its features are not finite; sealed shards stay.
        OSError: A shard cannot be written; sealed shards stay.
    """
    started, meter = time.perf_counter(), CpuMeter()
    run_tower = TowerRunner(tower, spec.codec)
    with ShardQueue(cache, spec, options.skip_bad, timings) as queue:
        for shard, keys, batch in _decoded_batches(work, images, tower, options, timings):
            if batch.bad and not options.skip_bad:
                raise _unusable(batch)
            queue.quarantine(shard, batch.bad)
            rows = run_tower(batch.crops) if batch.keys else None
            queue.append(shard, batch.keys, batch.sources, rows)
            if keys[-1] == shard.keys[-1]:
                queue.finish(shard)
            if meter.is_due():
                _warn_if_starved(meter, timings, options)
            yield Step(len(keys), len(batch.bad), batch.high_bit_depth, queue.sealed())
        last = queue.sealed(wait=True)
    timings.total += time.perf_counter() - started
    timings.cpu += _cpu_usage(meter, timings)
    yield Step(0, 0, 0, last)


def _decoded_batches(
    work: Sequence[ShardWork], images: ImageSource, tower: VisionTower, options: Options, timings: Timings
) -> Iterator[tuple[ShardWork, Sequence[str], DecodedBatch]]:
    size = options.batch_size
    batches = [(shard, shard.keys[start : start + size]) for shard in work for start in range(0, len(shard.keys), size)]
    if batches:
        images.prepare()
    loader = DataLoader(
        DecodeDataset(images, tower.preprocessor, [keys for _, keys in batches]),
        batch_size=None,
        num_workers=options.num_workers if batches else 0,
        pin_memory=tower.device.type == "cuda",
    )
    arriving = iter(loader)
    for shard, keys in batches:
        started = time.perf_counter()
        batch = _next(arriving)
        timings.waiting_for_images += time.perf_counter() - started
        timings.read += batch.read_seconds
        timings.decode += batch.decode_seconds
        timings.cpu += batch.cpu
        yield shard, keys, batch


def _cpu_usage(meter: CpuMeter, timings: Timings) -> CpuUsage:
    idle = timings.waiting_for_images + timings.waiting_for_disk
    return meter.usage(idle=idle, threads=torch.get_num_threads())


def _warn_if_starved(meter: CpuMeter, timings: Timings, options: Options) -> None:
    usage = timings.cpu + _cpu_usage(meter, timings)
    advice = usage.advice("--num_workers" if options.num_workers else None)
    if advice is not None:
        logger.warning("the extraction is slow: %s", advice)


def _next(arriving: Iterator[DecodedBatch]) -> DecodedBatch:
    try:
        return next(arriving)
    except MemoryError:
        raise UserError(
            "out of memory while images were decoded: run the same command again with a lower --num_workers "
            "or --batch_size"
        ) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a worker process that decodes images died ({error}); it may have run out of memory or of /dev/shm: "
            "run the same command again with a lower --num_workers or --batch_size"
        ) from None


def _unusable(batch: DecodedBatch) -> UserError:
    return combined_error(
        [f"{bad.key}: {bad.reason}" for bad in batch.bad],
        "images that cannot be used; fix them, remove their records, or skip them with --on_bad_image skip",
    )
