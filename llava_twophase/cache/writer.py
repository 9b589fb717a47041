"""``CacheWriter``: writes a feature cache from features that the caller computes, in any framework."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_twophase import __version__
from llava_twophase.cache.codec import Channels
from llava_twophase.cache.fingerprint import MISSING, differences
from llava_twophase.cache.inputs import (
    Source,
    check_key,
    describe_source,
    fingerprint_with_channels,
    json_object,
    make_codec,
    to_float32,
)
from llava_twophase.cache.manifest import Manifest, ShardEntry
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.session import (
    CacheSession,
    next_shard_number,
    report_software,
    sealed_shards,
    shard_path,
    software_plan,
)
from llava_twophase.cache.shard_writer import ShardSpec, ShardWriter, pwrite_all
from llava_twophase.cache.storage import is_url
from llava_twophase.errors import UserError, combined_error
from llava_twophase.files import explain_os_errors

if TYPE_CHECKING:
    import torch

_COPIED_BYTES = 1 << 24


class CacheWriter:
    """Write a feature cache row by row; use it in a ``with`` statement.

    ::

        with CacheWriter("caches/mine", (576, 1024), "bfloat16", {"tower": {"name": "my ViT"}}) as cache:
            for key, image in images:
                if key not in cache:
                    cache.add(key, tower(image))

    Rows are sealed in shards of ``images_per_shard``. If the process is killed, sealed shards are kept; running the
    same loop again skips their keys and ends with the same files, byte for byte. The end of the block marks the cache
    complete; an exception in the block does not. A complete cache can be extended: new keys go into new shards, and
    without new keys no file changes.

    Args:
        path: The cache's directory; it is created if it does not exist.
        shape: Tokens and width of one row.
        dtype: Storage dtype: ``float32``, ``float16``, ``bfloat16``, ``int8`` or ``int4``. Rows are rounded to it.
        fingerprint: Everything that changes a feature value, as JSON values. Fields that phase two knows are compared
            with its flags; other fields are only recorded.
        channels: Mean and std of each channel, for int8 and int4 only; see ``Channels.measure``.
        images_per_shard: Rows of a full shard.
        provenance: JSON values that are recorded and never compared. With dates in it, the manifest's bytes depend on
            when it was written.

    Raises:
        UserError: An argument is not valid. On entering the block: another process is writing to the cache, or the
            cache was made with a different fingerprint, shape, dtype or channels.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        shape: tuple[int, int],
        dtype: str,
        fingerprint: dict[str, Any],
        channels: Channels | None = None,
        images_per_shard: int = 1024,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        if is_url(str(path)):
            raise UserError(f"{path}: a cache is written to a folder; then run: llava-inspect-cache push FOLDER {path}")
        self.path = Path(path)
        software = {"llava-twophase": __version__, **{name: version(name) for name in ("h5py", "numpy")}}
        self._codec = make_codec(dtype, shape, channels)
        channels = self._codec.channels
        if type(images_per_shard) is not int or images_per_shard < 1:
            raise UserError(f"images_per_shard is {images_per_shard!r}, expected a positive integer")
        self._requested = Manifest(
            fingerprint=fingerprint_with_channels(json_object(fingerprint, "fingerprint"), channels),
            provenance=json_object({"software": software, **(provenance or {})}, "provenance"),
            images_per_shard=images_per_shard,
            channels=channels.to_json() if channels else {},
        )
        self._session: CacheSession | None = None
        self._sealed: FeatureCache | None = None
        self._shard: _OpenShard | None = None
        self._added: set[str] = set()
        self._begun = self._failed = False
        self._next_number = 0

    def __enter__(self) -> CacheWriter:
        with self._explained():
            session = CacheSession(self.path).__enter__()
            try:
                self._resume(session)
            except BaseException:
                session.__exit__()
                raise
        self._session = session
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        session = self._entered()
        try:
            if kind is None:
                with self._explained():
                    self._finish(session)
        finally:
            if self._shard is not None:
                self._shard.close()
            session.__exit__()
            self._session = None

    def __contains__(self, key: object) -> bool:
        """Tell whether a key is in the cache or has been added."""
        return key in self._added or self._is_sealed(key)

    def add(self, key: str, features: np.ndarray | torch.Tensor, source: Source | None = None) -> None:
        """Add one row. A key that an earlier session has sealed is skipped.

        Args:
            key: Image key: a relative path with forward slashes, without ``.`` and ``..`` parts.
            features: ``[tokens, width]`` in float32, float16 or bfloat16; values are rounded to the storage dtype.
            source: The image file, for ``verify --sources``: its path, its content, or its size and SHA-256. Without
                it, size and SHA-256 are stored as 0, which means "not recorded".

        Raises:
            UserError: The key is not valid or was added twice in this session; the shape or dtype is wrong; a value is
                not finite in the storage dtype; the disk is full. Sealed shards are kept.
        """
        session = self._entered()
        check_key(key)
        if key in self._added:
            raise UserError(f"key {key!r} was added twice; keys must be unique within a cache")
        if not self._is_sealed(key):
            row, described = self._row(key, features), describe_source(key, source)
            with self._explained():
                self._append(session, key, row, described)
        self._added.add(key)

    def _resume(self, session: CacheSession) -> None:
        found = session.found
        if found is None:
            self._begin(session, self._requested, [])
            return
        sealed = sealed_shards(self.path, found)
        if sealed:
            self._sealed = FeatureCache(self.path, manifest=replace(found, complete=True, shards=sealed))
        self._require_same(found)
        if not found.complete or sealed != found.shards:
            self._begin(session, found, sealed)

    def _require_same(self, found: Manifest) -> None:
        requested = self._requested
        # Both ways: a field that only one of them has is a difference too.
        expected = {**dict.fromkeys(found.fingerprint, MISSING), **requested.fingerprint}
        different = differences(found.fingerprint, expected)
        if self._sealed is not None:
            shape, dtype = self._sealed.feature_shape, self._sealed.dtype
            if shape != self._codec.feature_shape:
                different.append(f"shape: the cache has {shape}, this run {self._codec.feature_shape}")
            if dtype != self._codec.storage:
                different.append(f"dtype: the cache has {dtype!r}, this run {self._codec.storage!r}")
        if different:
            raise combined_error(
                different, f"{self.path} was made with different settings; use its settings or another folder"
            )

    def _begin(self, session: CacheSession, manifest: Manifest, sealed: list[ShardEntry]) -> None:
        current, resumed = self._requested.software, not manifest.complete
        report_software(manifest, current, resumed)
        session.merge_quarantine(())
        session.begin(manifest, sealed, software_plan(manifest, manifest.software if resumed else current))
        self._next_number = next_shard_number(sealed)
        self._begun = True

    def _append(self, session: CacheSession, key: str, row: np.ndarray, source: tuple[int, bytes]) -> None:
        if self._failed:
            raise UserError(f"an earlier row could not be written to {self.path}; run the same program again")
        self._failed = True  # until the row is written
        if not self._begun:
            self._begin(session, session.manifest, session.manifest.shards)
        if self._shard is None:
            self._shard = _OpenShard(shard_path(self.path, self._next_number), self._spec(session.manifest))
        self._shard.append(key, row, source)
        if len(self._shard.keys) == self._requested.images_per_shard:
            self._seal(session, self._shard)
        self._failed = False

    def _seal(self, session: CacheSession, shard: _OpenShard) -> None:
        shard.seal()
        shard.close()
        self._shard = None
        self._next_number += 1
        session.update_sometimes()

    def _finish(self, session: CacheSession) -> None:
        if self._failed:
            raise UserError(f"{self.path} is not complete: an earlier row could not be written")
        if self._shard is not None:
            self._seal(session, self._shard)
        if self._begun:
            session.update()
            session.merge_quarantine(self._added)
            session.complete()

    def _spec(self, manifest: Manifest) -> ShardSpec:
        codec = self._codec
        return ShardSpec(codec.feature_shape, codec.storage, manifest.fingerprint, manifest.software, codec.channels)

    def _row(self, key: str, features: Any) -> np.ndarray:
        values = to_float32(key, features)
        if values.shape != self._codec.feature_shape:
            raise UserError(f"features of {key!r} have shape {values.shape}, expected {self._codec.feature_shape}")
        if not np.isfinite(values).all():
            raise UserError(f"features of {key!r} are not finite: they hold inf or NaN")
        row = self._codec.numpy_to_rows(values[np.newaxis])  # uint8 [1, row_bytes]
        if not self._codec.finite(row).all():
            largest = float(np.abs(values).max())
            raise UserError(f"features of {key!r} are not finite in {self._codec.storage}: the largest is {largest:g}")
        return row

    def _is_sealed(self, key: object) -> bool:
        return self._sealed is not None and key in self._sealed

    def _entered(self) -> CacheSession:
        if self._session is None:
            raise ValueError("a CacheWriter is used in a with statement: with CacheWriter(...) as cache")
        return self._session

    def _explained(self) -> AbstractContextManager[None]:
        return explain_os_errors(
            self.path, "the feature cache", lambda: "run the same program again: sealed shards are kept"
        )


class _OpenShard:
    # The shard that is being filled. Its rows wait in an unnamed file, because a shard is laid out by the number of its
    # keys and the length of the longest one, which are known when it is sealed.

    def __init__(self, path: Path, spec: ShardSpec) -> None:
        self.keys: list[str] = []
        self._path, self._spec = path, spec
        self._sources: list[tuple[int, bytes]] = []
        self._rows = tempfile.TemporaryFile(dir=path.parent, buffering=0)  # noqa: SIM115

    def append(self, key: str, row: np.ndarray, source: tuple[int, bytes]) -> None:
        """Add one stored row."""
        pwrite_all(self._rows.fileno(), row, len(self.keys) * self._spec.row_bytes)
        self._sources.append(source)
        self.keys.append(key)

    def seal(self) -> None:
        """Write the shard and give it its final name."""
        writer = ShardWriter(self._path, self.keys, self._spec)
        try:
            step = max(1, _COPIED_BYTES // self._spec.row_bytes)
            for start in range(0, len(self.keys), step):
                rows = np.frombuffer(self._rows.read(step * self._spec.row_bytes), np.uint8)
                writer.append(rows.reshape(-1, self._spec.row_bytes), self._sources[start : start + step])
            writer.seal()
        finally:
            writer.discard()

    def close(self) -> None:
        self._rows.close()
