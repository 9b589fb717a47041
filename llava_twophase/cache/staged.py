"""A remote cache with copies of shards on this machine: which shards are copied, and when.

A thread copies shards in the order of their first use. A copy that is still needed is removed for another one only if
the last use of that one is before: in a random order, every shard is used from the first steps to the last, and to copy
a shard again for a few rows costs more than to request them. Rows of shards without a copy are requested.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_twophase.cache.manifest import Manifest, ShardEntry
from llava_twophase.cache.remote import RemoteStorage
from llava_twophase.cache.shard import Shard
from llava_twophase.cache.staging import Stage
from llava_twophase.cache.storage import Piece, Storage
from llava_twophase.distributed import ranks_from_environment
from llava_twophase.errors import UserError
from llava_twophase.text import format_bytes

logger = logging.getLogger(__name__)

# Requests for copies at the same time. Rows that a step waits for have connections of their own.
_REQUESTS = 8
_PAUSE = 1.0  # seconds between two looks for room
_FULL_PAUSE = 60.0


class StagedStorage:
    """A remote cache whose rows are read from copies where there are some.

    Args:
        storage: The remote cache.
        stage: The folder of the copies.
        manifest: The cache's manifest.

    Attributes:
        folder: None, as for the remote cache.

    Raises:
        UserError: The folder cannot be written, or a shard is larger than its limit.
    """

    folder: Path | None = None

    def __init__(self, storage: Storage, stage: Stage, manifest: Manifest) -> None:
        stage.prepare()
        largest = max(entry.file_bytes for entry in manifest.shards)
        if largest > stage.limit:
            raise UserError(
                f"--stage_gb {stage.limit / 1e9:g} is too small: a shard of {storage} has {format_bytes(largest)}"
            )
        self._storage, self._stage = storage, stage
        self._manifest = manifest
        self._entries = {entry.file: entry for entry in manifest.shards}
        self._plan = _Plan([], np.empty(0, np.int64))
        self._changed = threading.Condition()
        self._copier: threading.Thread | None = None
        # A separate storage, so that copies do not delay rows.
        self._source = RemoteStorage(str(storage), _REQUESTS)
        self._warned = False
        self._failures = 0  # of requests or checksums, since the last copy

    def __str__(self) -> str:
        """Return the URL."""
        return str(self._storage)

    def read_file(self, name: str) -> bytes | None:
        """Return the content of a small file, None if there is no such file."""
        return self._storage.read_file(name)

    def without(self, name: str) -> str:
        """Return what this storage is, given that it does not have a file."""
        return self._storage.without(name)

    def will_open(self, names: Sequence[str], headers_only: bool = False) -> None:
        """Request the headers, keys and checksums of shards."""
        self._storage.will_open(names, headers_only)

    def open_shard(self, name: str) -> Shard:
        """Open a shard; its bytes are read from a copy whenever there is one."""
        return StagedShard(self._storage.open_shard(name), self._entries[name], self._stage)

    def read_together(self, pieces: Sequence[Piece]) -> None:
        """Read several pieces, from copies where there are some.

        Raises:
            UserError: One cannot be read.
        """
        missing: list[Piece] = []
        for shard, view, offset in pieces:
            if not (isinstance(shard, StagedShard) and shard.read_copy(view, offset)):
                missing.append((shard.remote if isinstance(shard, StagedShard) else shard, view, offset))
        self._storage.read_together(missing)

    def stage_ahead(self, shards: np.ndarray) -> None:
        """Copy shards in the background, in the order of their first use. This replaces an earlier order.

        Args:
            shards: The position in the manifest of each row that will be used, in the order of use.
        """
        with self._changed:
            self._plan = _Plan(self._manifest.shards, shards)
            self._changed.notify_all()
            if self._copier is None:
                self._copier = threading.Thread(target=self._copy_all, name="stage", daemon=True)
                self._copier.start()

    def advance(self, count: int) -> None:
        """Record that so many rows of the order have been used: copies that no later row needs may be removed."""
        self._plan.position += count

    def close(self) -> None:
        """Give up what other threads are reading or copying, and copy nothing more until ``stage_ahead``."""
        self.stage_ahead(np.empty(0, np.int64))
        self._source.close()
        self._storage.close()

    def _copy_all(self) -> None:
        plan, pause = self._plan, 0.0
        while threading.main_thread().is_alive():
            with self._changed:
                if pause:
                    self._changed.wait(pause)
                if plan is not self._plan:
                    plan = self._plan
                waiting = [entry for entry in plan.remaining() if not self._stage.has(entry)]
                if not waiting:
                    self._copier = None
                    return
            pause = self._copy(waiting, plan)

    def _copy(self, waiting: list[ShardEntry], plan: _Plan) -> float:
        # Copy the first shard that no other process is copying, and return how long to wait for the next.
        others = [entry for entry in waiting if not self._stage.is_in_progress(entry)]
        entry = others[0] if others else waiting[0]
        try:
            shard = self._source.open_shard(entry.file)
            added = self._stage.add(shard, entry, self._manifest, lambda: plan.kept_for(entry))
            if added:
                self._warned, self._failures = False, 0
            return 0.0 if added else _PAUSE
        except OSError as error:
            advice = "free some space or lower --stage_gb" if error.errno == errno.ENOSPC else "fix the cause"
            self._warn(f"{error}; rows are requested until then: {advice}")
            return _FULL_PAUSE
        except (UserError, RuntimeError) as error:  # RuntimeError: the interpreter is shutting down
            logger.info("--stage_dir %s: %s", self._stage.folder, error)
            self._failures += isinstance(error, UserError)  # one may be over at the next attempt
            if self._failures > 1:
                self._warn(f"{self._failures} copies failed, rows are requested until one succeeds: {error}")
            return _FULL_PAUSE

    def _warn(self, what: str) -> None:
        # Once, until a copy succeeds, by one of the ranks that share the folder: the cause may last for hours.
        if not self._warned and ranks_from_environment().local_rank == 0:
            logger.warning("--stage_dir %s: %s", self._stage.folder, what)
        self._warned = True


class StagedShard(Shard):
    """A remote shard that may have a copy.

    Args:
        remote: The remote shard.
        entry: The shard as the manifest lists it.
        stage: Where its copy is.

    Attributes:
        remote: The remote shard.
    """

    def __init__(self, remote: Shard, entry: ShardEntry, stage: Stage) -> None:
        self.path, self.size = remote.path, remote.size
        self.remote = remote
        self._entry, self._stage = entry, stage

    def read_copy(self, view: memoryview, offset: int) -> bool:
        """Read bytes of the copy; returns whether there is one."""
        copy = self._stage.open(self._entry)
        if copy is None:
            return False
        try:
            copy.read_into(view, offset)
        except UserError:
            self.distrust()
            return False
        return True

    def read_into(self, view: memoryview, offset: int) -> None:
        """Read bytes of the copy, or of the remote shard without one.

        Raises:
            UserError: They cannot be read.
        """
        if not self.read_copy(view, offset):
            self.remote.read_into(view, offset)

    def changed(self) -> str:
        """Return how the remote file differs from when it was opened; empty if it does not."""
        return self.remote.changed()

    def distrust(self) -> None:
        """Remove the copy: a row of it does not match its checksum."""
        self._stage.remove(self._entry)


class _Plan:
    # The order in which shards are used, and how much of it is done.

    def __init__(self, entries: Sequence[ShardEntry], shards: np.ndarray) -> None:
        self.position = 0
        first, last = np.full(len(entries), len(shards)), np.full(len(entries), -1)
        first[shards[::-1]] = np.arange(len(shards))[::-1]  # of several assignments, the last one remains
        last[shards] = np.arange(len(shards))
        order = np.argsort(first, kind="stable").tolist()
        self._uses = [(entries[number], int(first[number]), int(last[number])) for number in order]
        self._last = {entry.xxh3_128: end for entry, _, end in self._uses}

    def remaining(self) -> list[ShardEntry]:
        # The shards that later rows need, in the order of their first use.
        return [entry for entry, _, last in self._uses if last >= self.position]

    def kept_for(self, new: ShardEntry) -> set[str]:
        # The shards whose copies must not be removed for this one.
        end = self._last[new.xxh3_128]
        return {entry.xxh3_128 for entry, first, last in self._uses if last >= self.position and first <= end}
