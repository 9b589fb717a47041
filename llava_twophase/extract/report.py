"""Reports of an extraction as text or JSON: its plan, and duplicate images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

from llava_twophase.cache.codec import Codec
from llava_twophase.cache.format import BLOCK, STORAGE_DTYPES, row_bytes
from llava_twophase.cache.quarantine import Quarantined
from llava_twophase.extract.break_even import BreakEven
from llava_twophase.extract.plan import Plan
from llava_twophase.files import free_bytes
from llava_twophase.text import format_bytes

_SHOWN = 20


@dataclass(frozen=True)
class PlanReport:
    """The report that ``--plan`` prints.

    Attributes:
        records: Records of the data file.
        images: Distinct images of the records.
        repeated: Images with more than one record; each is encoded once.
        cached: Images that are in the cache.
        quarantined: Images skipped by an earlier run whose files have not changed.
        missing: Images to encode without a file.
        unusable: Images to encode whose files are empty, not images, or too large, judged by their first bytes.
        to_encode: Images to encode.
        shards: Shards to write.
        bytes: Bytes to write.
        features: Tokens and width of one image's features.
        bytes_per_image: Stored bytes of one image for each storage dtype that can hold the features.
        free_bytes: Free bytes on the cache's disk.
        fits: Whether the features fit on the disk.
        images_per_second: Measured rate of one rank; None without work.
        seconds: Estimated time; None without work.
        problems: All quarantined, missing and unusable images, with the reason.
        break_even: With ``--llm``: training runs with the cache and without.
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
    features: tuple[int, int]
    bytes_per_image: dict[str, int]
    images_per_second: float | None = None
    seconds: float | None = None
    problems: list[str] = field(default_factory=list)
    break_even: BreakEven | None = None

    def text(self) -> str:
        """Return the report in lines."""
        lines = [
            f"records     {self.records}, with {self.images} images ({self.repeated} of them in several records)",
            f"cached      {self.cached}",
            f"quarantined {self.quarantined}",
            f"to encode   {self.to_encode}, of them {self.missing} missing and {self.unusable} unusable",
            f"shards      {self.shards}",
            f"disk        {format_bytes(self.bytes)} of {format_bytes(self.free_bytes)} free"
            + ("" if self.fits else ": they do not fit"),
        ]
        sizes = ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in self.bytes_per_image.items())
        lines.append(f"one image   {self.features[0]} x {self.features[1]}: {sizes}")
        if self.seconds is not None and self.images_per_second is not None:
            estimate = timedelta(seconds=round(self.seconds))
            lines.append(f"time        {estimate}, at {self.images_per_second:.2f} images/s")
        if self.break_even is not None:
            lines.append(self.break_even.text())
        lines += [f"  {problem}" for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"  ... and {len(self.problems) - _SHOWN} more; --plan --json lists all of them")
        return "\n".join(lines)

    def json(self) -> str:
        """Return the report as one JSON object."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def bytes_per_image(feature_shape: tuple[int, int]) -> dict[str, int]:
    """Return the stored bytes of one image for each storage dtype; int4 is absent if it cannot hold the width."""
    dtypes = [dtype for dtype in STORAGE_DTYPES if dtype != "int4" or feature_shape[1] % BLOCK == 0]
    return {dtype: row_bytes(dtype, feature_shape) for dtype in dtypes}


def report_plan(
    records: Sequence[str],
    plan: Plan,
    bad: Sequence[Quarantined],
    missing: int,
    codec: Codec,
    cache: Path,
    rate: float | None,
    break_even: BreakEven | None = None,
) -> PlanReport:
    """Make the report that ``--plan`` prints.

    Args:
        records: The image key of each record.
        plan: The plan.
        bad: Images to encode that cannot be used, missing ones included.
        missing: Number of missing images.
        codec: Stores the features.
        cache: The cache's directory.
        rate: Measured images per second, if any.
        break_even: Training runs with the cache and without, if computed.
    """
    counts = Counter(records)
    images = len(plan.keys)
    needed, free = images * codec.row_bytes, free_bytes(cache)
    return PlanReport(
        records=len(records),
        images=len(counts),
        repeated=sum(count > 1 for count in counts.values()),
        cached=plan.cached,
        quarantined=len(plan.quarantined),
        missing=missing,
        unusable=len(bad) - missing,
        to_encode=images,
        shards=len(plan.work),
        bytes=needed,
        free_bytes=free,
        fits=needed <= free,
        features=codec.feature_shape,
        bytes_per_image=bytes_per_image(codec.feature_shape),
        images_per_second=rate,
        seconds=images / rate if rate and images else None,
        break_even=break_even,
        problems=[f"{entry.key}: {entry.reason}" for entry in [*plan.quarantined, *bad]],
    )
