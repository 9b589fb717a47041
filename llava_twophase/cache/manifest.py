"""``manifest.json``: the shards of a cache and what made them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llava_twophase.cache.format import FORMAT, MANIFEST, SCHEMA, canonical_json, check_schema
from llava_twophase.cache.storage import Storage, open_storage
from llava_twophase.errors import UserError, short_repr
from llava_twophase.files import replace_file

_KINDS: dict[str, type] = {
    "fingerprint": dict,
    "provenance": dict,
    "channels": dict,
    "images_per_shard": int,
    "complete": bool,
    "plan": dict,
}


_NO_SHARDS = "[]\n}\n"


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One sealed shard as the manifest lists it."""

    file: str
    rows: int
    file_bytes: int
    xxh3_128: str


@dataclass
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        fingerprint: What changes a feature value.
        provenance: What is recorded and never compared.
        images_per_shard: Rows of a full shard.
        complete: Whether the last extraction was finished.
        channels: For int8 and int4, the result of ``codec.Channels.to_json``.
        plan: The last extraction's plan: ``first_shard`` and ``digest``, see ``extract/plan.py``. ``software`` is what
            the plan's shards record as theirs; without it, they record that of ``provenance``.
        shards: The sealed shards.
    """

    fingerprint: dict[str, Any]
    provenance: dict[str, Any]
    images_per_shard: int
    complete: bool = False
    plan: dict[str, Any] = field(default_factory=dict)
    channels: dict[str, Any] = field(default_factory=dict)
    shards: list[ShardEntry] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Images in the cache."""
        return sum(shard.rows for shard in self.shards)

    @property
    def software(self) -> dict[str, Any]:
        """What the shards of the last plan record as their software."""
        return _software(self.plan) or self.recorded_software

    @property
    def recorded_software(self) -> dict[str, Any]:
        """What the cache's first shards record as their software; empty if the manifest has no such object."""
        return _software(self.provenance)


def _software(values: dict[str, Any]) -> dict[str, Any]:
    found = values.get("software")
    return dict(found) if isinstance(found, dict) else {}


def read_manifest(cache: str | Path | Storage) -> Manifest:
    """Read and check a cache's manifest.

    Args:
        cache: The cache's directory, its URL, or its storage.

    Raises:
        UserError: The cache has no manifest, or it is damaged, or of another format or schema.
    """
    storage = open_storage(cache)
    data, path = storage.read_file(MANIFEST), f"{storage}/{MANIFEST}"
    if data is None:
        raise UserError(f"{storage} is not a feature cache: it {storage.without(MANIFEST)}")
    try:
        content = json.loads(data.decode("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    check_schema(content, path)
    try:
        shards = [_shard_entry(entry) for entry in content["shards"]]
        values = {name: content[name] for name in _KINDS}
        canonical_json(values)  # refuses NaN and infinity
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {short_repr(error)}") from None
    for name, kind in _KINDS.items():
        if type(values[name]) is not kind:
            raise UserError(f"{path} is damaged: {name} is {short_repr(values[name])}")
    return Manifest(shards=shards, **values)


def write_manifest(cache: Path, manifest: Manifest) -> None:
    """Replace a cache's manifest."""
    with replace_file(cache / MANIFEST, "w") as file:
        file.write(_to_json(manifest))


def _to_json(manifest: Manifest) -> str:
    # What json.dumps with indent=1 gives. It has no fast path for indented text, and takes five times as long.
    content = {"format": FORMAT, "schema": SCHEMA, **asdict(replace(manifest, shards=[]))}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if not manifest.shards:
        return text
    shards = ",\n".join(
        f'  {{\n   "file": {_quoted(shard.file)},\n   "rows": {shard.rows},\n   "file_bytes": {shard.file_bytes},\n'
        f'   "xxh3_128": {_quoted(shard.xxh3_128)}\n  }}'
        for shard in manifest.shards
    )
    return f"{text.removesuffix(_NO_SHARDS)}[\n{shards}\n ]\n}}\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _shard_entry(entry: Any) -> ShardEntry:
    shard = ShardEntry(**{part.name: entry[part.name] for part in fields(ShardEntry)})
    if not isinstance(shard.file, str) or not re.fullmatch(r"shard-[0-9]{6,18}\.h5", shard.file):
        raise ValueError(f"shard file {shard.file!r} is not named shard-NNNNNN.h5")
    if (
        type(shard.rows) is not int
        or not 0 < shard.rows < 1 << 40
        or type(shard.file_bytes) is not int
        or not isinstance(shard.xxh3_128, str)
    ):
        raise ValueError(f"shard entry {entry!r}")
    return shard
