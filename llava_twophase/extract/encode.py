"""Crops to stored rows on the device, without waiting for it; knows nothing of shards or images' names.

Shapes: B images of a batch, S the crop's side.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch

from llava_twophase.cache.codec import Codec
from llava_twophase.errors import UserError
from llava_twophase.vision.tower import VisionTower

logger = logging.getLogger(__name__)


class Rows:
    """Stored rows on their way to the host.

    Attributes:
        encode_seconds: Time in the tower and the codec, once the rows have arrived.
        copy_seconds: Time of the copy.
    """

    def __init__(self, encode: Callable[[], torch.Tensor], device: torch.device) -> None:
        self.encode_seconds = self.copy_seconds = 0.0
        self._events: list[torch.cuda.Event] = []
        started = time.perf_counter()
        if device.type != "cuda":
            rows = encode()  # [B, row_bytes]
            encoded = time.perf_counter()
            self._host = rows.cpu()
            self.encode_seconds, self.copy_seconds = encoded - started, time.perf_counter() - encoded
            return
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        self._events[0].record()
        rows = encode()  # only queued: the device works on it while this process goes on
        self._events[1].record()
        self._host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
        self._events[2].record()

    def __len__(self) -> int:
        """Return B."""
        return len(self._host)

    def numpy(self) -> np.ndarray:
        """Wait until the rows have arrived; ``uint8 [B, row_bytes]``."""
        if self._events:
            start, encoded, copied = self._events
            copied.synchronize()
            self.encode_seconds = start.elapsed_time(encoded) / 1000
            self.copy_seconds = encoded.elapsed_time(copied) / 1000
            self._events = []
        return self._host.numpy()


class Encoder:
    """Runs the tower and the codec; halves the batch where the device's memory does not hold it.

    Args:
        tower: The frozen vision tower.
        codec: Makes stored rows of features.
    """

    def __init__(self, tower: VisionTower, codec: Codec) -> None:
        self._tower, self._codec = tower, codec
        self._limit = 0

    def __call__(self, pixels: torch.Tensor) -> Rows:
        """Encode one batch.

        Args:
            pixels: ``uint8 [B, S, S, 3]``.

        Returns:
            Its stored rows, maybe still on their way.

        Raises:
            UserError: The device's memory does not even hold one image.
        """
        self._limit = self._limit or len(pixels)
        while True:
            try:
                return Rows(lambda: self._encode(pixels), self._tower.device)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                self._halve(min(self._limit, len(pixels)))

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        rows = [self._codec.to_rows(self._tower.encode(part)) for part in pixels.split(self._limit)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)  # [B, row_bytes]

    def _halve(self, tried: int) -> None:
        if self._tower.device.type == "cuda":
            torch.cuda.empty_cache()
        if tried == 1:
            raise UserError(
                f"out of memory on {self._tower.device} with a single image; end what else uses it, "
                "or try --compute_dtype bf16, or another --device"
            )
        self._limit = tried // 2
        logger.warning(
            "out of memory with %d images at once: going on with %d (--batch_size %d avoids the attempt)",
            tried, self._limit, self._limit,
        )  # fmt: skip


def _out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator raises a bare RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
