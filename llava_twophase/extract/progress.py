"""Progress of all ranks together: a bar on a terminal, otherwise a log line every half minute."""

from __future__ import annotations

import logging
import time
from collections import Counter
from datetime import timedelta

from tqdm import tqdm

from llava_twophase.text import counted, format_bytes

logger = logging.getLogger(__name__)

LINE_SECONDS = 30.0


class Progress:
    """Shows images, images/s, remaining time, bytes and quarantined images.

    Args:
        total: Images to encode, on all ranks.
        row_bytes: Stored bytes of one image.
    """

    def __init__(self, total: int, row_bytes: int) -> None:
        self._total, self._row_bytes = total, row_bytes
        self._started = self._shown = time.monotonic()
        self._bar = tqdm(total=total, unit="img", desc="features", disable=None, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, done: Counter[str]) -> None:
        """Show the progress of all ranks.

        Args:
            done: Number of processed ``images``, and of ``quarantined`` ones among them.
        """
        images, quarantined = done["images"], done["quarantined"]
        stored = format_bytes((images - quarantined) * self._row_bytes, 2)
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{stored}, {quarantined} quarantined", refresh=False)
            self._bar.update(images - self._bar.n)
            return
        now = time.monotonic()
        if now - self._shown >= LINE_SECONDS and images:
            self._shown = now
            rate = images / (now - self._started)
            left = timedelta(seconds=round((self._total - images) / rate))
            logger.info(
                "%d of %s, %.1f images/s, %s left, %s, %d quarantined",
                images, counted(self._total, "image"), rate, left, stored, quarantined,
            )  # fmt: skip
