"""Writes rows into shards in background threads, while the tower works on the next batches."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_twophase.cache.manifest import ShardEntry
from llava_twophase.cache.quarantine import Quarantined, write_part
from llava_twophase.cache.session import shard_path
from llava_twophase.cache.shard_writer import NotFiniteError, ShardSpec, ShardWriter
from llava_twophase.errors import UserError
from llava_twophase.extract.encode import EncodedBatch
from llava_twophase.extract.plan import ShardWork
from llava_twophase.extract.timings import Timings

# Batches that may wait for the disk; more would only use memory.
_PENDING = 3


@dataclass(frozen=True)
class Sealed:
    """One finished shard.

    Attributes:
        number: Its number.
        entry: Its entry in the manifest; None if none of its images could be used, so that it has no file.
        bad: Its quarantined images.
    """

    number: int
    entry: ShardEntry | None
    bad: list[Quarantined]


class ShardQueue:
    """Writes batches of rows in order and seals each shard, in the background.

    One thread writes and hashes; another one seals, because syncing a gigabyte takes seconds.

    Args:
        cache: The cache's directory.
        spec: What all shards share.
        skip_bad: Whether images with features that are not finite are quarantined; otherwise they are an error.
        timings: The time of each step is added to it.
    """

    def __init__(self, cache: Path, spec: ShardSpec, skip_bad: bool, timings: Timings) -> None:
        self._cache, self._spec = cache, spec
        self._skip_bad, self._timings = skip_bad, timings
        self._writers: dict[int, ShardWriter] = {}
        self._bad: dict[int, list[Quarantined]] = defaultdict(list)
        self._write_thread, self._seal_thread = ThreadPoolExecutor(1, "writer"), ThreadPoolExecutor(1, "sealer")
        self._writes: list[Future[None]] = []
        self._seals: list[Future[Sealed]] = []

    def __enter__(self) -> ShardQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error in one batch, the shards before it are still sealed; Ctrl-C ends at once.
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        for thread in (self._write_thread, self._seal_thread):
            thread.shutdown(cancel_futures=interrupted)
        for writer in self._writers.values():
            writer.discard()

    def append(self, shard: ShardWork, keys: Sequence[str], sources: list[Any], rows: EncodedBatch | None) -> None:
        """Write the next rows of a shard. Waits only while too many batches wait for the disk.

        Args:
            shard: The shard.
            keys: The rows' image keys.
            sources: Size and SHA-256 of each image file.
            rows: The rows; None if the batch has none.

        Raises:
            UserError: An earlier batch had features that are not finite.
            OSError: An earlier batch could not be written.
        """
        self._writes.append(self._write_thread.submit(self._append, shard, keys, sources, rows))
        started = time.perf_counter()
        while len(self._writes) > _PENDING:
            self._writes.pop(0).result()
        self._timings.waiting_for_disk += time.perf_counter() - started

    def quarantine(self, shard: ShardWork, bad: Sequence[Quarantined]) -> None:
        """Quarantine images of a shard: they get no row. Called before the rows after them are appended."""
        if bad:
            self._writes.append(self._write_thread.submit(self._quarantine, shard, bad))

    def finish(self, shard: ShardWork) -> None:
        """Seal a shard when its rows are written."""
        self._writes.append(self._write_thread.submit(self._finish, shard))

    def sealed(self, wait: bool = False) -> list[Sealed]:
        """Return the shards sealed since the last call.

        Args:
            wait: Wait for all finished shards.

        Raises:
            UserError: As ``append``.
            OSError: As ``append``.
        """
        started, done = time.perf_counter(), []
        while self._writes and (wait or self._writes[0].done()):
            self._writes.pop(0).result()
        while self._seals and (wait or self._seals[0].done()):
            done.append(self._seals.pop(0).result())
        self._timings.waiting_for_disk += time.perf_counter() - started
        return done

    def _append(self, shard: ShardWork, keys: Sequence[str], sources: list[Any], rows: EncodedBatch | None) -> None:
        if rows is None:
            return
        values = rows.numpy()  # uint8 [B, row_bytes]
        self._timings.encode += rows.encode_seconds
        self._timings.copy += rows.copy_seconds
        started = time.perf_counter()
        writer = self._writer(shard)
        try:
            writer.append(values, sources)
        except NotFiniteError as error:
            if not self._skip_bad:
                raise UserError(f"{error}; try --compute_dtype bf16 or fp32 (fp16 overflows above 65504)") from None
            lost = set(error.rows.tolist())
            bad = [
                Quarantined(keys[row], "the tower's features are not finite", size, digest.hex())
                for row, (size, digest) in enumerate(sources)
                if row in lost
            ]
            self._quarantine(shard, bad)
            kept = [row for row in range(len(keys)) if row not in lost]
            writer.append(values[np.array(kept, int)], [sources[row] for row in kept])
        self._timings.write += time.perf_counter() - started

    def _quarantine(self, shard: ShardWork, bad: Sequence[Quarantined]) -> None:
        writer = self._writer(shard)
        for entry in bad:
            writer.drop(entry.key)
            self._bad[shard.number].append(entry)

    def _finish(self, shard: ShardWork) -> None:
        if self._seals:
            self._seals[-1].exception()  # waits for it; sealed() raises its error
        self._seals.append(self._seal_thread.submit(self._seal, shard))

    def _seal(self, shard: ShardWork) -> Sealed:
        started = time.perf_counter()
        writer, bad = self._writers[shard.number], self._bad.pop(shard.number, [])
        path = shard_path(self._cache, shard.number)
        # The quarantine first, then the shard: a resumed run does not look at a sealed shard again.
        write_part(path, bad)
        entry = writer.seal() if len(bad) < len(shard.keys) else None
        if entry is None:
            writer.discard()
        del self._writers[shard.number]
        self._timings.seal += time.perf_counter() - started
        return Sealed(shard.number, entry, bad)

    def _writer(self, shard: ShardWork) -> ShardWriter:
        if shard.number not in self._writers:
            self._writers[shard.number] = ShardWriter(shard_path(self._cache, shard.number), shard.keys, self._spec)
        return self._writers[shard.number]
