"""What an extraction says before and after its work, as text or JSON; knows nothing of how it works."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from llava_twophase.cache.codec import Codec
from llava_twophase.cache.quarantine import Quarantined
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.extract.break_even import Pays
from llava_twophase.extract.decode import CropDataset
from llava_twophase.extract.encode import Encoder
from llava_twophase.extract.plan import Plan
from llava_twophase.files import free_bytes
from llava_twophase.vision.images import Images
from llava_twophase.vision.tower import VisionTower

logger = logging.getLogger(__name__)

_CALIBRATION_SECONDS = 5.0
_SHOWN = 20


@dataclass(frozen=True)
class PlanReport:
    """What ``--plan`` prints.

    Attributes:
        records: Records of the data file.
        images: Images that they name.
        repeated: Images that more than one record names; each is encoded once.
        cached: Images that are in the cache.
        quarantined: Images left out by an earlier run, whose files have not changed.
        missing: Images to encode without a file.
        unusable: Images to encode that are empty, foreign or too large, by the beginning of their files.
        to_encode: Images to encode.
        shards: Shards to write.
        bytes: Stored bytes to come.
        free_bytes: Free bytes of the cache's disk.
        fits: Whether they fit.
        images_per_second: Of a short calibration of one rank; None without work.
        seconds: The estimate; None without work.
        examples: Some of the missing and unusable ones.
        pays: With ``--llm``: training runs with the cache and without.
    """

    records: int
    images: int
    repeated: int
    cached: int
    quarantined: int
    missing: int
    unusable: int
    to_encode: int
    shards: int
    bytes: int
    free_bytes: int
    fits: bool
    images_per_second: float | None = None
    seconds: float | None = None
    examples: list[str] = field(default_factory=list)
    pays: Pays | None = None

    def text(self) -> str:
        """Return the report in lines."""
        lines = [
            f"records     {self.records}, naming {self.images} images ({self.repeated} of them more than once)",
            f"cached      {self.cached}",
            f"quarantined {self.quarantined}",
            f"to encode   {self.to_encode}, of which {self.missing} are missing and {self.unusable} unusable",
            f"shards      {self.shards}",
            f"disk        {self.bytes / 1e9:.3f} GB of {self.free_bytes / 1e9:.3f} GB free"
            + ("" if self.fits else ": they do not fit"),
        ]
        if self.seconds is not None and self.images_per_second is not None:
            left = timedelta(seconds=round(self.seconds))
            lines.append(f"time        {left}, at {self.images_per_second:.2f} images/s")
        if self.pays is not None:
            lines.append(self.pays.text())
        return "\n".join([*lines, *(f"  {example}" for example in self.examples)])

    def json(self) -> str:
        """Return the report as one JSON object."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def report_plan(
    records: Sequence[str],
    plan: Plan,
    bad: Sequence[Quarantined],
    missing: int,
    row_bytes: int,
    cache: Path,
    rate: float | None,
    pays: Pays | None = None,
) -> PlanReport:
    """Gather what ``--plan`` prints.

    Args:
        records: The image key of each record.
        plan: The plan.
        bad: Images to encode that cannot be used, the missing ones included.
        missing: How many of them are missing.
        row_bytes: Stored bytes of one image.
        cache: The cache's directory.
        rate: Images/s, where they were measured.
        pays: Training runs with the cache and without, where they were weighed.

    Returns:
        The report.
    """
    counts = Counter(records)
    images = len(plan.keys)
    needed, free = images * row_bytes, free_bytes(cache)
    return PlanReport(
        records=len(records),
        images=len(counts),
        repeated=sum(count > 1 for count in counts.values()),
        cached=plan.cached,
        quarantined=len(plan.left_out),
        missing=missing,
        unusable=len(bad) - missing,
        to_encode=images,
        shards=len(plan.work),
        bytes=needed,
        free_bytes=free,
        fits=needed <= free,
        images_per_second=rate,
        seconds=images / rate if rate and images else None,
        pays=pays,
        examples=[f"{entry.key}: {entry.reason}" for entry in bad[:_SHOWN]],
    )


def calibrate(
    images: Images, tower: VisionTower, codec: Codec, keys: Sequence[str], batch_size: int, num_workers: int
) -> tuple[float, float] | None:
    """Measure how many images/s one rank makes, on the first images that can be used; takes some seconds.

    Returns:
        Images/s of the tower, and of decoding by all workers; the slower one is the extraction's. None where no image
        can be used.
    """
    dataset = CropDataset(images, tower.preprocessor, [keys[: max(1, batch_size)]])
    started = time.perf_counter()
    crops = dataset[0]
    decode = (time.perf_counter() - started) / max(1, len(crops.keys))
    if not crops.keys:
        return None
    encoder = Encoder(tower, codec)
    count, spent, rate = 1, 0.0, 0.0
    # Ever larger batches, up to a full one that has been run before: the first of a size pays for what is set up once.
    while spent < _CALIBRATION_SECONDS:
        started = time.perf_counter()
        encoder(crops.pixels[:count]).numpy()
        seconds = time.perf_counter() - started
        spent += seconds
        rate = max(rate, count / seconds)
        count = min(4 * count, len(crops.keys), max(1, int(rate * (_CALIBRATION_SECONDS - spent))))
    return rate, max(1, num_workers) / decode


def report_twins(cache: FeatureCache) -> str | None:
    """Say which pictures stand in the cache under many names, by the hash of their files; None where there are none."""
    digests = np.ascontiguousarray(cache.column("source_sha256")).view("V32").ravel()
    _, first, inverse, counts = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    twins = np.flatnonzero(counts > 1)
    if not len(twins):
        return None
    largest = twins[np.argsort(-counts[twins], kind="stable")[:5]]
    wanted = {int(first[group]): int(counts[group]) for group in largest}
    names: dict[int, Any] = {row: key for row, key in enumerate(cache.keys()) if row in wanted}
    examples = ", ".join(f"{names[row]} under {count} names" for row, count in wanted.items())
    return (
        f"{int(counts[twins].sum())} images are {len(twins)} pictures under several names, byte for byte: {examples}"
        + (", ..." if len(twins) > len(wanted) else "")
    )
