"""A cache at a URL, read by ranges: fsspec makes the requests, this module combines and repeats them.

Credentials, endpoints and proxies are those of fsspec and of the library that it uses for the protocol. Requests are
made by threads, because some file systems of fsspec are synchronous. A forked process connects again: fsspec's event
loop and its connections do not survive a fork.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from llava_twophase.cache.file_systems import connect
from llava_twophase.cache.format import SHARDS, USER_BLOCK
from llava_twophase.cache.header import decode_header
from llava_twophase.cache.remote_errors import RangesIgnored, is_missing
from llava_twophase.cache.remote_shard import RemoteShard
from llava_twophase.cache.repetition import Repetition
from llava_twophase.cache.shard import Shard
from llava_twophase.cache.time_limits import LONGEST, UNSIZED, TimeLimits
from llava_twophase.errors import UserError

logger = logging.getLogger(__name__)

REQUESTS = 32
"""Requests of one process at the same time."""
# How long failed requests are repeated, in seconds. While a cache is being opened, a user waits for the error. During
# training, the outage may be over before anybody looks.
OPENING, READING = 10.0, LONGEST
# Longer ranges are divided. Rows of all usual towers are shorter.
_LONGEST_RANGE = 4 << 20
# Header, keys and checksums of a shard of 1,024 images fit.
_HEAD = 128 << 10
_OPENED_AHEAD = 2 * REQUESTS
_KEYS_AND_CHECKSUMS = ("image_key", "key_xxh3", "row_xxh3")
# What changes with a file's content, by the names of different protocols.
_VERSIONS = ("ETag", "etag", "blob_id", "Last-Modified", "LastModified", "mtime", "created")


class RemoteStorage:
    """A cache at a URL. Threads and forked processes may share an instance.

    Args:
        url: The URL of the cache's folder, for any protocol of fsspec.
        requests: Most requests of this process at the same time.

    Attributes:
        folder: None: there is no folder on this machine.

    Raises:
        UserError: No installed package reads the URL.
    """

    folder: Path | None = None

    def __init__(self, url: str, requests: int = REQUESTS) -> None:
        self._url, self._requests = url.rstrip("/"), requests
        self._repeat = Repetition()
        self._limits = TimeLimits(requests)
        self._versions: dict[str, tuple[int, str]] = {}
        self._waiting: deque[str] = deque()
        self._headers_only = False
        self._coming: dict[str, Future[RemoteShard]] = {}
        self._opening_given_up = threading.Event()
        self._reading: set[threading.Event] = set()
        self._connect()

    def __str__(self) -> str:
        """Return the URL."""
        return self._url

    def read_file(self, name: str) -> bytes | None:
        """Return the content of a small file, None if there is no such file.

        Raises:
            UserError: It cannot be read, or the server ignores ranges.
        """

        def read() -> bytes:
            data: bytes = self._call("cat_file", name)
            if len(data) > 2:
                # A server without ranges would send a complete shard for each row. This shows it with a small file.
                self._range(name, 1, 2)
            return data

        try:
            return self._repeat(read, self._url_of(name), OPENING)
        except UserError as error:
            if error.__cause__ is not None and is_missing(error.__cause__):
                return None
            raise

    def without(self, name: str) -> str:
        """Return what this storage is, given that it does not have a file."""
        return f"has no {name}"

    def open_shard(self, name: str) -> Shard:
        """Open a shard: from what ``will_open`` requested, otherwise by a request for its size if it is new.

        Raises:
            UserError: It cannot be opened.
        """
        future = self._coming.pop(name, None)
        if future is not None:
            self._request_heads(1)
            return future.result()
        if name not in self._versions:
            return self._open(name, self._opening_given_up)
        return RemoteShard(self, name, *self._versions[name])

    def will_open(self, names: Sequence[str], headers_only: bool = False) -> None:
        """Request the sizes, headers, keys and row checksums of shards, some shards ahead of ``open_shard``."""
        self._waiting.extend(names)
        self._headers_only = headers_only
        # Object storage and the Hub list sizes and ETags of many files at once. Web servers do not.
        with suppress(Exception):
            for info in self._call("ls", SHARDS, detail=True):
                if isinstance(info.get("size"), int) and _version(info):
                    self._versions[str(info["name"]).rpartition("/")[2]] = info["size"], _version(info)
        self._request_heads(_OPENED_AHEAD)

    def read_together(self, pieces: Sequence[tuple[Shard, memoryview, int]]) -> None:
        """Read several pieces, with many requests at the same time.

        Raises:
            UserError: One cannot be read.
        """
        given_up, pool = threading.Event(), self._pool_here()
        self._reading.add(given_up)
        tasks = [
            pool.submit(self._read_piece, shard, view[begin : begin + _LONGEST_RANGE], offset + begin, given_up)
            for shard, view, offset in pieces
            for begin in range(0, len(view), _LONGEST_RANGE)
        ]
        try:
            for task in tasks:
                task.result()
        finally:
            # After an error, nothing may write to the caller's memory any more.
            given_up.set()
            self._reading.discard(given_up)
            for task in tasks:
                if not task.cancel():
                    task.exception()

    def close(self) -> None:
        """Give up what other threads read, and shards that ``will_open`` requested.

        Failed requests are not repeated, and requests that wait are not made. Later calls work again.
        """
        for given_up in (self._opening_given_up, *self._reading):
            given_up.set()
        for future in self._coming.values():
            future.cancel()
        self._waiting.clear()
        self._coming.clear()
        self._opening_given_up = threading.Event()

    def version_of(self, name: str, given_up: threading.Event | None = None) -> tuple[int, str]:
        """Return the size of a shard on the server now, and its ETag or what the protocol has instead.

        Args:
            name: The shard's file name.
            given_up: Once it is set, a failed request is not repeated.

        Raises:
            UserError: There is no such shard, or the server does not state its size.
        """
        file = f"{SHARDS}/{name}"
        info = self._repeat(lambda: self._call("info", file), self._url_of(file), OPENING, given_up)
        if not isinstance(info.get("size"), int):
            raise UserError(f"{self._url}/{file} cannot be read: the server does not state its size")
        return info["size"], _version(info)

    def forget_listings(self) -> None:
        """Make ``version_of`` ask the server again."""
        self._files.invalidate_cache()

    def upload(self, file: Path, name: str) -> None:
        """Write a file of this machine to the URL's folder; object storage shows it when it is complete.

        Raises:
            UserError: It cannot be written.
        """
        put = partial(self._files.put_file, str(file), self._path(name))
        self._repeat(put, self._url_of(name), READING, action="written")

    def _connect(self) -> None:
        self._files, self._root = connect(self._url, self._requests)
        self._pool = ThreadPoolExecutor(self._requests, "requests")
        self._owner = os.getpid()

    def _pool_here(self) -> ThreadPoolExecutor:
        if self._owner != os.getpid():
            self._connect()  # this is a forked child
        return self._pool

    def _request_heads(self, count: int) -> None:
        while count > 0 and self._waiting:
            name = self._waiting.popleft()
            self._coming[name] = self._pool_here().submit(self._open, name, self._opening_given_up)
            count -= 1

    def _open(self, name: str, given_up: threading.Event) -> RemoteShard:
        size, version = self._versions.get(name) or self.version_of(name, given_up)
        self._versions[name] = size, version
        file = f"{SHARDS}/{name}"

        def head(start: int, end: int) -> bytes:
            patience = max(OPENING, self._limits.at_lowest_rate(end - start))
            return self._get(file, start, end, patience, given_up)

        if self._headers_only:
            return RemoteShard(self, name, size, version, head(0, min(USER_BLOCK, size)))
        found = head(0, min(_HEAD, size))
        with suppress(UserError):  # a damaged header is reported by the reader
            datasets = [decode_header(found[:USER_BLOCK], file).datasets[part] for part in _KEYS_AND_CHECKSUMS]
            end = min(size, max(data.offset + data.nbytes for data in datasets))
            found += head(len(found), end) if end > len(found) else b""
        return RemoteShard(self, name, size, version, found)

    def _read_piece(self, shard: Shard, view: memoryview, offset: int, given_up: threading.Event) -> None:
        name = shard.path.removeprefix(f"{self._url}/")
        view[:] = self._get(name, offset, offset + len(view), READING, given_up)

    def _get(self, name: str, start: int, end: int, patience: float, given_up: threading.Event | None = None) -> bytes:
        limit = self._limits.first(end - start)

        def get() -> bytes:
            nonlocal limit
            started = monotonic()
            try:
                data = self._range(name, start, end, limit)
            except TimeoutError:
                limit = self._limits.after(limit)
                raise
            self._limits.add(end - start, monotonic() - started)
            return data

        return self._repeat(get, self._url_of(name), patience, given_up)

    def _range(self, name: str, start: int, end: int, timeout: float = UNSIZED) -> bytes:
        # A synchronous file system opens a file for each range; reading ahead would multiply the traffic.
        options = {} if self._files.async_impl else {"cache_type": "none"}
        data: bytes = self._call("cat_file", name, timeout, start=start, end=end, **options)
        if len(data) > end - start:
            raise RangesIgnored(
                f"{self._url_of(name)} cannot be read by ranges: the server sent {len(data)} bytes where {end - start} "
                "were requested; use a server that supports range requests, or copy the cache to a local disk"
            )
        if len(data) < end - start:
            raise EOFError(f"the server sent {len(data)} bytes where {end - start} were requested")
        return data

    def _call(self, method: str, name: str, timeout: float = UNSIZED, **options: Any) -> Any:
        self._pool_here()
        if self._files.async_impl:
            options["timeout"] = timeout
        return getattr(self._files, method)(self._path(name), **options)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _url_of(self, name: str) -> str:
        return f"{self._url}/{name}"


def _version(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
