"""Batches from a feature cache, read by threads into a ring of buffers while the previous step computes.

Data loader workers allocate a new tensor for each sample and another for the batch, which takes ten times longer than
reading. Here rows are read from the file directly into one of a few reused buffers, which are pinned for a GPU.

Accelerate's data loader fetches one batch ahead and calls ``.to(device)`` just before the batch is needed. It fetches a
``PendingBatch``. By then the features are being copied to the GPU; ``to`` decodes them.

From a URL, one batch ahead is too few: a failed request may take longer than a step. Several batches are read ahead on
the host, as the order of the epoch gives them. Their memory is limited.

Shapes: B samples, T ids, L patch tokens, D tower width.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_twophase.cache.codec import Codec
from llava_twophase.cache.joined import AnyCache, JoinedCodec
from llava_twophase.cache.remote import REQUESTS
from llava_twophase.train.data.upcoming import Upcoming

# Several concurrent reads are faster than one; one core remains for the step itself.
_THREADS = max(1, min(4, (os.cpu_count() or 1) - 1))
_POSITION = "position_in_batch"
# Bytes a second. Slower reads come from a disk, which is faster if it is told about the complete batch first.
_MEMORY_SPEED = 2e9
# Memory for batches that are read ahead from a URL: 16 s of a rank that reads 16 MB/s, as one with 13B does.
_AHEAD_BYTES = 256 << 20
_MOST_AHEAD = 32


Batch = dict[str, Any]


@dataclass(frozen=True)
class _ReadBatch:
    """A batch as it was read.

    Attributes:
        tokens: What the collator made, without features.
        rows: The stored rows, on the host or on the GPU.
        copied: The end of the copy to the GPU.
    """

    tokens: Batch
    rows: torch.Tensor
    copied: torch.cuda.Event | None


@dataclass
class _Reading:
    """A batch that is being read to the host.

    Attributes:
        indices: Its samples.
        target: The memory of its rows.
        begun: Its result is what the collator made, and the reads that have been started.
        pending: The batch, once it has been asked for.
    """

    indices: list[int]
    target: torch.Tensor
    begun: Future[tuple[Batch, list[Future[None]]]]
    pending: PendingBatch | None = None

    def cancel(self) -> None:
        """Do not read what has not been started; ``release`` waits for the rest."""
        if not self.begun.cancel() and self.begun.done() and self.begun.exception() is None:
            for read in self.begun.result()[1]:
                read.cancel()

    def release(self) -> None:
        """Wait until nothing writes to the rows or copies from them."""
        if not self.begun.cancelled() and self.begun.exception() is None:
            wait(self.begun.result()[1])
        if self.pending is not None:
            self.pending.release()


class PendingBatch:
    """A batch that threads are still reading.

    Args:
        future: Its result is the batch as it was read.
        codec: Decodes its rows.
    """

    def __init__(self, future: Future[_ReadBatch], codec: Codec | JoinedCodec) -> None:
        self._future, self._codec = future, codec

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Wait for the batch on the host, and make the device's current stream wait for its features.

        Args:
            device: The target device.
            non_blocking: Accepted and ignored: a copy from pinned memory never blocks.

        Returns:
            What the collator made, and ``features`` ``[B, L, D]``. On the CPU, features of an exact storage dtype are
            a view of the ring, which later batches overwrite.

        Raises:
            UserError: A row could not be read.
        """
        read = self._future.result()
        batch = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in read.tokens.items()
        }
        if read.copied is not None:
            stream = torch.cuda.current_stream(read.rows.device)
            stream.wait_event(read.copied)
            read.rows.record_stream(stream)  # the memory belongs to the copy stream
        return {**batch, "features": self._codec.from_rows(read.rows.to(device))}

    def release(self) -> None:
        """Wait until nothing writes to the rows or copies from them."""
        if self._future.exception() is None and (copied := self._future.result().copied) is not None:
            copied.synchronize()


class PrefetchDataset(Dataset[PendingBatch]):
    """A dataset of complete batches for a data loader without workers, whose ``collate_fn`` returns its argument.

    Args:
        tokenize: Returns a sample's ``input_ids`` and ``labels``.
        collate: Makes a batch of samples; it may reorder them.
        cache: The feature cache, or the joined caches.
        keys: The image key of each sample, or its row, as ``cache.rows`` returns it.
        batch_size: Largest B.
        batches_in_use: Batches that training uses at the same time: the steps of gradient accumulation.
        device: Where batches go. A GPU gets them from pinned memory, one step ahead, on a separate copy stream.

    Raises:
        UserError: A key is not in the cache.
    """

    def __init__(
        self,
        tokenize: Callable[[int], dict[str, torch.Tensor]],
        collate: Callable[[list[dict[str, torch.Tensor]]], Batch],
        cache: AnyCache,
        keys: Sequence[str] | np.ndarray,
        batch_size: int,
        batches_in_use: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self._tokenize, self._collate = tokenize, collate
        self._cache, self._rows = cache, keys if isinstance(keys, np.ndarray) else cache.rows(keys)
        # A remote cache requests all rows of a call at the same time, and needs no further threads for them.
        self._ahead = _batches_ahead(batch_size * cache.codec.row_bytes) if cache.is_remote else 0
        self._parts = 1 if cache.is_remote else _THREADS
        # As many batches as the cache's requests can be for. Failed requests of one do not wait for later ones.
        together = 1 + -(-REQUESTS // batch_size) if cache.is_remote else 1
        # One more is being read, and the previous step may still use one more.
        shape = (batches_in_use + 2 + self._ahead, batch_size, cache.codec.row_bytes)
        gpu = device is not None and device.type == "cuda"
        self._ring = torch.empty(shape, dtype=torch.uint8, pin_memory=gpu)
        self._copies = torch.cuda.Stream(device) if gpu else None
        self._slots: list[_Reading | None] = [None] * len(self._ring)
        self._next, self._cold = 0, True
        self._ranks = 1
        self._upcoming = Upcoming([], 1)
        self._started: deque[_Reading] = deque()
        self._readers = ThreadPoolExecutor(self._parts * together, "features")
        self._collator = ThreadPoolExecutor(1, "batches")
        self._deliverer = ThreadPoolExecutor(1, "copies")

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._rows)

    @property
    def is_remote(self) -> bool:
        """Whether rows come from a URL, so that ``announce`` makes reading faster."""
        return self._cache.is_remote

    def announce(self, order: Sequence[int] | np.ndarray, used: int, ranks: int) -> None:
        """Give the order of an epoch: batches from a URL are read ahead, and shards are copied to a stage.

        Args:
            order: The samples that all ranks use, in their order.
            used: Samples at its start that will not be used, because a run resumed after them.
            ranks: Ranks that share the samples; they take batches in turn.
        """
        self._ranks = ranks
        self._upcoming = Upcoming(order, self._ring.shape[1], ranks)
        self._cache.stage_ahead(self._rows[np.asarray(order[used:], np.int64)])

    def close(self) -> None:
        """Read nothing more. Reads that have been started end by themselves, or when the cache is closed."""
        for pool in (self._collator, self._readers, self._deliverer):
            pool.shutdown(wait=False, cancel_futures=True)

    def __getitem__(self, index: int) -> PendingBatch:
        """Start reading a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> PendingBatch:
        """Start reading a batch; torch's data loader calls this with all of its indices."""
        wanted = list(indices)
        self._cache.advance(len(wanted) * self._ranks)
        reading = self._take(wanted)
        for batch in self._upcoming.after(wanted, self._ahead)[len(self._started) :]:
            self._started.append(self._start(batch))
        reading.pending = PendingBatch(self._deliverer.submit(self._deliver, reading), self._cache.codec)
        return reading.pending

    def _take(self, indices: list[int]) -> _Reading:
        # The batch as it was begun ahead of its use. If another one was expected, those after it were wrong too.
        if self._started and self._started[0].indices == indices:
            return self._started.popleft()
        for reading in self._started:
            reading.cancel()
        self._next = (self._next - len(self._started)) % len(self._ring)
        self._started.clear()
        return self._start(indices)

    def _start(self, indices: list[int]) -> _Reading:
        slot = self._next
        self._next = (slot + 1) % len(self._ring)
        previous = self._slots[slot]
        if previous is not None:
            previous.release()
        target = self._ring[slot, : len(indices)]
        reading = self._slots[slot] = _Reading(indices, target, self._collator.submit(self._begin, indices, target))
        return reading

    def _begin(self, indices: list[int], target: torch.Tensor) -> tuple[Batch, list[Future[None]]]:
        buffer = target.numpy()
        if self._cold:
            self._cache.will_need(self._rows[np.asarray(indices)])
        samples = [{**self._tokenize(index), _POSITION: torch.tensor(i)} for i, index in enumerate(indices)]
        batch = self._collate(samples)
        # The collator may have reordered the samples; features follow their text.
        rows = self._rows[np.asarray(indices)[batch.pop(_POSITION).numpy()]]
        bounds = np.linspace(0, len(rows), min(self._parts, len(rows)) + 1, dtype=int).tolist()
        parts = [slice(first, last) for first, last in pairwise(bounds)]
        return batch, [self._readers.submit(self._cache.read_raw_rows_into, rows[part], buffer[part]) for part in parts]

    def _deliver(self, reading: _Reading) -> _ReadBatch:
        batch, reads = reading.begun.result()
        started = time.perf_counter()
        for read in reads:
            read.result()
        self._cold = reading.target.nbytes < _MEMORY_SPEED * (time.perf_counter() - started)
        return _ReadBatch(batch, *self._copy_to_device(reading.target))

    def _copy_to_device(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if self._copies is None:
            return rows, None
        with torch.cuda.stream(self._copies):
            return rows.to(self._copies.device, non_blocking=True), self._copies.record_event()

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled to a worker process: a batch would have to be copied back."""
        raise TypeError("a PrefetchDataset reads with threads; use it without data loader workers")


def _batches_ahead(batch_bytes: int) -> int:
    return max(1, min(_MOST_AHEAD, _AHEAD_BYTES // batch_bytes))
