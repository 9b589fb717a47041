"""Batches from a feature cache, read by threads into a kept ring of buffers while the step before computes.

The usual way (data loader workers, a fresh tensor for each sample and another for the batch) spends ten times longer
on fresh memory than on reading. Here rows go from the file straight into one of a few buffers, pinned for a GPU.

Accelerate's data loader fetches a batch ahead and asks it with ``.to(device)`` to move just before it is needed: a
``PendingBatch`` is what it fetches, and the features move, and are decoded, in its ``to``.

Shapes: B samples, T ids, L patch tokens, D tower width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_twophase.cache.reader import FeatureCache

_THREADS = 4


class PendingBatch:
    """A batch that threads are still reading.

    Args:
        text: Becomes ``input_ids`` and ``labels``.
        reads: End when ``rows`` is filled.
        rows: Stored rows ``uint8 [B, row_bytes]``, a part of the ring.
        cache: Decodes them.
    """

    def __init__(
        self, text: Future[dict[str, torch.Tensor]], reads: list[Future[None]], rows: torch.Tensor, cache: FeatureCache
    ) -> None:
        self._text, self._reads, self._rows, self._codec = text, reads, rows, cache.codec
        self._copied: torch.cuda.Event | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> dict[str, torch.Tensor]:
        """Wait for the reads and move the batch.

        Args:
            device: Where to.
            non_blocking: Accepted: from pinned memory a copy never blocks.

        Returns:
            ``input_ids`` and ``labels``, and ``features`` ``[B, L, D]``. On the CPU, exact features are the ring's own
            memory, which later batches overwrite.

        Raises:
            UserError: A row could not be read.
        """
        batch = {name: values.to(device, non_blocking=True) for name, values in self._text.result().items()}
        for read in self._reads:
            read.result()
        rows = self._rows.to(device, non_blocking=True)
        if rows.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return {**batch, "features": self._codec.decode(rows)}

    def release(self) -> None:
        """Wait until nothing writes to the rows or copies from them."""
        for read in self._reads:
            read.exception()
        if self._copied is not None:
            self._copied.synchronize()


class FeedingDataset(Dataset[PendingBatch]):
    """What a data loader without workers takes its batches from, whole: its ``collate_fn`` has nothing to do.

    Args:
        text: Makes ``input_ids`` and ``labels`` of the samples at some indices.
        cache: Where features come from.
        keys: The image key of each sample.
        batch_size: Largest B.
        held: How many batches training holds at once: the steps of gradient accumulation.
        pin: Whether batches go to a GPU.

    Raises:
        UserError: A key is not in the cache.
    """

    def __init__(
        self,
        text: Callable[[Sequence[int]], dict[str, torch.Tensor]],
        cache: FeatureCache,
        keys: Sequence[str],
        batch_size: int,
        held: int = 1,
        pin: bool = False,
    ) -> None:
        self._text, self._cache, self._rows = text, cache, cache.rows(keys)
        # One more is being read, and one more is what the last step may still use.
        shape = (held + 2, batch_size, cache.codec.row_bytes)
        self._ring = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        self._pending: list[PendingBatch | None] = [None] * len(self._ring)
        self._next = 0
        self._readers = ThreadPoolExecutor(_THREADS, "features")
        self._writer = ThreadPoolExecutor(1, "text")

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._rows)

    def __getitem__(self, index: int) -> PendingBatch:
        """Start reading a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> PendingBatch:
        """Start reading a batch; torch's data loader calls this with all of its indices."""
        slot = self._next
        self._next = (slot + 1) % len(self._ring)
        before = self._pending[slot]
        if before is not None:
            before.release()
        rows = self._rows[np.asarray(indices)]
        buffer = self._ring[slot, : len(rows)]
        text = self._writer.submit(self._text, list(indices))
        parts = np.array_split(np.arange(len(rows)), min(_THREADS, len(rows)))
        reads = [
            self._readers.submit(
                self._cache.read_rows_into, rows[part], buffer[int(part[0]) : int(part[-1]) + 1].numpy()
            )
            for part in parts
        ]
        pending = self._pending[slot] = PendingBatch(text, reads, buffer, self._cache)
        return pending

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to go to a worker, whose memory the batch would have to leave again."""
        raise TypeError("a FeedingDataset reads with threads; use it without data loader workers")
