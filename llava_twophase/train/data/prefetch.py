"""Batches from a feature cache, read by threads into a kept ring of buffers while the step before computes.

The usual way (data loader workers, a fresh tensor for each sample and another for the batch) spends ten times longer
on fresh memory than on reading. Here rows go from the file straight into one of a few buffers, pinned for a GPU.

Accelerate's data loader fetches a batch ahead and asks it with ``.to(device)`` to move just before it is needed: a
``PendingBatch`` is what it fetches. By then its features are on their way to a GPU; they are decoded in its ``to``.

Shapes: B samples, T ids, L patch tokens, D tower width.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_twophase.cache.codec import Codec
from llava_twophase.cache.reader import FeatureCache

# Several reads in flight are faster than one; a core is left for the step itself.
_THREADS = max(1, min(4, (os.cpu_count() or 1) - 1))
_PLACE = "place"
# Bytes a second: what is read more slowly comes from a disk, which works faster when told of a whole batch first.
_MEMORY_SPEED = 2e9


Batch = dict[str, Any]


@dataclass(frozen=True)
class _Made:
    """What a batch is made of: all but its features, and its stored rows, to a GPU still under way."""

    rest: Batch
    rows: torch.Tensor
    copied: torch.cuda.Event | None


class PendingBatch:
    """A batch that threads are still making.

    Args:
        ready: Gives what it is made of.
        codec: Decodes its rows.
    """

    def __init__(self, ready: Future[_Made], codec: Codec) -> None:
        self._ready, self._codec = ready, codec

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Wait for the batch on the host, and let the device's current stream wait for its features.

        Args:
            device: Where to.
            non_blocking: Accepted: from pinned memory a copy never blocks.

        Returns:
            What the collator made, and ``features`` ``[B, L, D]``. On the CPU, exact features are the ring's own
            memory, which later batches overwrite.

        Raises:
            UserError: A row could not be read.
        """
        made = self._ready.result()
        batch = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in made.rest.items()
        }
        if made.copied is not None:
            stream = torch.cuda.current_stream(made.rows.device)
            stream.wait_event(made.copied)
            made.rows.record_stream(stream)  # its memory belongs to the stream of the copies
        return {**batch, "features": self._codec.decode(made.rows.to(device))}

    def release(self) -> None:
        """Wait until nothing writes to the rows or copies from them."""
        if self._ready.exception() is None and (copied := self._ready.result().copied) is not None:
            copied.synchronize()


class FeedingDataset(Dataset[PendingBatch]):
    """What a data loader without workers takes its batches from, whole: its ``collate_fn`` has nothing to do.

    Args:
        text: Makes a sample's ``input_ids`` and ``labels``.
        collate: Makes a batch of samples, in whatever order.
        cache: Where features come from.
        keys: The image key of each sample.
        batch_size: Largest B.
        held: How many batches training holds at once: the steps of gradient accumulation.
        device: Where batches go: to a GPU from pinned memory, by copies on a stream of their own, a step ahead.

    Raises:
        UserError: A key is not in the cache.
    """

    def __init__(
        self,
        text: Callable[[int], dict[str, torch.Tensor]],
        collate: Callable[[list[dict[str, torch.Tensor]]], Batch],
        cache: FeatureCache,
        keys: Sequence[str],
        batch_size: int,
        held: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self._text, self._collate, self._cache, self._rows = text, collate, cache, cache.rows(keys)
        # One more is being read, and one more is what the last step may still use.
        shape = (held + 2, batch_size, cache.codec.row_bytes)
        gpu = device is not None and device.type == "cuda"
        self._ring = torch.empty(shape, dtype=torch.uint8, pin_memory=gpu)
        self._copies = torch.cuda.Stream(device) if gpu else None
        self._pending: list[PendingBatch | None] = [None] * len(self._ring)
        self._next, self._cold = 0, True
        self._readers = ThreadPoolExecutor(_THREADS, "features")
        self._leader = ThreadPoolExecutor(1, "batches")

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
        ready = self._leader.submit(self._make, list(indices), self._ring[slot, : len(indices)])
        pending = self._pending[slot] = PendingBatch(ready, self._cache.codec)
        return pending

    def _make(self, indices: list[int], ring: torch.Tensor) -> _Made:
        buffer = ring.numpy()
        if self._cold:
            self._cache.will_need(self._rows[np.asarray(indices)])
        samples = [{**self._text(index), _PLACE: torch.tensor(place)} for place, index in enumerate(indices)]
        batch = self._collate(samples)
        # The collator may have sorted the samples: features go where their text went.
        rows = self._rows[np.asarray(indices)[batch.pop(_PLACE).numpy()]]
        cuts = np.linspace(0, len(rows), min(_THREADS, len(rows)) + 1, dtype=int).tolist()
        parts = [slice(first, last) for first, last in pairwise(cuts)]
        reads = [self._readers.submit(self._cache.read_rows_into, rows[part], buffer[part]) for part in parts]
        started = time.perf_counter()
        for read in reads:
            read.result()
        self._cold = buffer.nbytes < _MEMORY_SPEED * (time.perf_counter() - started)
        return _Made(batch, *self._send(ring))

    def _send(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if self._copies is None:
            return rows, None
        with torch.cuda.stream(self._copies):
            return rows.to(self._copies.device, non_blocking=True), self._copies.record_event()

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to go to a worker, whose memory the batch would have to leave again."""
        raise TypeError("a FeedingDataset reads with threads; use it without data loader workers")
