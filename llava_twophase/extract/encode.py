"""Crops to stored rows: the tower and the codec, run asynchronously on the device.

Shapes: B images of a batch, S side of the crop in pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from llava_twophase.cache.codec import Codec
from llava_twophase.errors import UserError
from llava_twophase.memory import is_out_of_memory
from llava_twophase.vision.tower import VisionTower

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class EncodedBatch:
    """Stored rows that are being computed or copied to the host.

    Args:
        encode: Computes the rows ``[B, row_bytes]``.
        device: Where ``encode`` runs.

    Attributes:
        encode_seconds: Time in the tower and the codec; known after ``numpy``.
        copy_seconds: Time of the copy to the host; known after ``numpy``.
    """

    def __init__(self, encode: Callable[[], torch.Tensor], device: torch.device) -> None:
        self.encode_seconds = 0.0
        self.copy_seconds = 0.0
        self._events: list[torch.cuda.Event] = []
        self._rows = self._start(encode) if device.type == "cuda" else self._run(encode)

    def __len__(self) -> int:
        """Return B."""
        return len(self._rows)

    def numpy(self) -> np.ndarray:
        """Wait for the rows and return them: ``uint8 [B, row_bytes]``."""
        if self._events:
            start, encoded, copied = self._events
            copied.synchronize()
            self.encode_seconds = start.elapsed_time(encoded) / 1000
            self.copy_seconds = encoded.elapsed_time(copied) / 1000
            self._events = []
        return self._rows.numpy()

    def _start(self, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        # Everything is only queued: the device works while this process prepares the next batch.
        self._events = [_timing_event() for _ in range(3)]
        self._events[0].record()
        rows = encode()
        self._events[1].record()
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
        self._events[2].record()
        return host

    def _run(self, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        started = time.perf_counter()
        rows = encode()
        encoded = time.perf_counter()
        host = rows.cpu()
        self.encode_seconds = encoded - started
        self.copy_seconds = time.perf_counter() - encoded
        return host


class TowerRunner:
    """Runs the tower and the codec. Halves the batch when the device runs out of memory.

    Args:
        tower: The frozen vision tower.
        codec: Makes stored rows from features; not needed for ``features``.
    """

    def __init__(self, tower: VisionTower, codec: Codec | None = None) -> None:
        self._tower = tower
        self._codec = codec
        self._limit = 0  # images of one forward pass; 0 before the first batch

    def __call__(self, crops: torch.Tensor) -> EncodedBatch:
        """Encode one batch.

        Args:
            crops: ``uint8 [B, S, S, 3]``.

        Returns:
            Its stored rows; on an accelerator they may still be computed.

        Raises:
            UserError: The device's memory does not hold a single image.
        """
        return self._retry(crops, lambda: EncodedBatch(lambda: self._rows(crops), self._tower.device))

    def features(self, crops: torch.Tensor) -> torch.Tensor:
        """Return the features ``[B, L, D]`` of one batch.

        Args:
            crops: ``uint8 [B, S, S, 3]``.

        Raises:
            UserError: The device's memory does not hold a single image.
        """
        return self._retry(crops, lambda: torch.cat([self._tower.encode(part) for part in self._parts(crops)]))

    def _retry(self, crops: torch.Tensor, run: Callable[[], _Result]) -> _Result:
        self._limit = self._limit or len(crops)
        while True:
            try:
                return run()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(min(self._limit, len(crops)))

    def _parts(self, crops: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(crops, self._limit)

    def _rows(self, crops: torch.Tensor) -> torch.Tensor:
        assert self._codec is not None
        rows = [self._codec.to_rows(self._tower.encode(part)) for part in self._parts(crops)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)  # [B, row_bytes]

    def _halve(self, tried: int) -> None:
        if self._tower.device.type == "cuda":
            torch.cuda.empty_cache()
        if tried == 1:
            raise UserError(
                f"out of memory on {self._tower.device} with a single image; stop other programs that use its memory, "
                "or try --compute_dtype bf16 or another --device"
            )
        self._limit = tried // 2
        logger.warning(
            "out of memory with a batch of %d images: continuing with %d (--batch_size %d avoids the attempt)",
            tried, self._limit, self._limit,
        )  # fmt: skip


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
