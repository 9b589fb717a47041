"""``summary``: what made a cache and how large it is, without reading features."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_twophase.cache.check.hdf5_process import Hdf5Checker
from llava_twophase.cache.check.metadata_copy import local_metadata
from llava_twophase.cache.format import FORMAT, MANIFEST, QUANTISED, SCHEMA
from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.inspection import output
from llava_twophase.layers import describe
from llava_twophase.text import counted, format_bytes
from llava_twophase.vision.families import FAMILIES

INCOMPLETE = "INCOMPLETE: the extraction was interrupted or is running; run the same extraction command again."
_CROPS = {"square": "the centre square of each image", "pad": "each image padded to a square"}
_FEATURES = {"patch": "without the CLS token", "cls_patch": "with the CLS token"}
# What a cache of the extraction command records; a cache that a user's program wrote may record less, or other fields.
_EXPECTED = ("tower.model_type", "image_aspect_ratio", "compute_dtype", "select_layer", "select_feature")


def run(path: str, as_json: bool) -> int:
    """Print a summary."""
    values = summarize(path)
    output.print_result(values, as_json, lambda out: _print(values, out))
    return 0


def summarize(path: str | Path) -> dict[str, Any]:
    """Describe a cache without reading its features.

    Args:
        path: The cache's directory; its extraction may be incomplete.

    Returns:
        JSON values.

    Raises:
        UserError: There is no cache, or it is damaged.
    """
    cache = FeatureCache(path, allow_incomplete=True)
    tokens, width = cache.feature_shape
    bfloat16 = 2 * tokens * width
    return {
        "path": str(path),
        "format": FORMAT,
        "schema": SCHEMA,
        "complete": cache.manifest.complete,
        "made_by": made_by(cache),
        "not_recorded": not_recorded(cache.fingerprint, _EXPECTED),
        "images": len(cache),
        "shards": len(cache.manifest.shards),
        "bytes": sum(shard.file_bytes for shard in cache.manifest.shards),
        "bytes_per_image": cache.codec.row_bytes,
        "of_bfloat16": round(cache.codec.row_bytes / bfloat16, 4),
        "storage_dtype": cache.dtype,
        "tokens": tokens,
        "width": width,
        "images_per_shard": cache.manifest.images_per_shard,
        "quarantined": len(read_quarantine(cache.path)),
        "age_seconds": _age(cache),
        "fingerprint": cache.fingerprint,
        "provenance": cache.manifest.provenance,
        "shard_software": shard_software(cache),
    }


def shard_software(cache: FeatureCache) -> dict[str, dict[str, int]]:
    """Count the software versions that shards record: a cache may be extended under other versions.

    Returns:
        Name to version to number of shards. Shards whose attributes cannot be read are skipped; verify reports them.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    with Hdf5Checker() as checker:  # in another process: HDF5 can crash on damaged metadata
        cache.storage.will_open([shard.file for shard in cache.manifest.shards])
        for shard, header in zip(cache.manifest.shards, cache.headers, strict=True):
            with local_metadata(cache.storage.open_shard(shard.file), header) as path:
                attributes = checker.attributes(path) or {}
            for name, version in output.flatten(attributes.get("provenance") or {}).items():
                found[name][version] += 1
    return {name: dict(versions) for name, versions in found.items() if name}


def not_recorded(fingerprint: dict[str, Any], fields: tuple[str, ...]) -> list[str]:
    """Return the fields, as dotted names, that a fingerprint does not have."""

    def has(name: str) -> bool:
        value: Any = fingerprint
        for part in name.split("."):
            if not isinstance(value, dict) or value.get(part) is None:
                return False
            value = value[part]
        return True

    return [name for name in fields if not has(name)]


def made_by(cache: FeatureCache) -> str:
    """Return one sentence on what made a cache, and what its fingerprint does not record about that."""
    tokens, width = cache.feature_shape
    made = cache.fingerprint
    shape = f"{tokens} tokens of {width} for each image, stored as {cache.dtype}"
    if len(not_recorded(made, _EXPECTED)) == len(_EXPECTED):
        return f"A program of its own made these features ({_own_name(made)}): {shape}."
    feature = made.get("select_feature")
    kept = _FEATURES.get(str(feature), f"({feature})" if feature is not None else f"(select_feature {_MISSING})")
    dtype, layer = _recorded(made, "compute_dtype", "a dtype"), made.get("select_layer")
    states = f"hidden state a layer ({_MISSING})" if layer is None else describe(layer)
    verb = "were" if isinstance(layer, list) else "was"
    seen = _seen(made.get("image_aspect_ratio"))
    return f"{_tower(cache)} saw {seen} in {dtype}; its {states} {kept} {verb} kept: {shape}."


_MISSING = f"{output.NOT_RECORDED} in the fingerprint"


def _tower(cache: FeatureCache) -> str:
    tower = cache.fingerprint.get("tower")
    tower = tower if isinstance(tower, dict) else {}
    kind = tower.get("model_type")
    name = cache.manifest.provenance.get("vision_tower")
    layers = tower.get("num_hidden_layers")
    of_layers = f" of {layers} layers" if layers is not None else ""
    title = FAMILIES[str(kind)].title.partition(",")[0] if str(kind) in FAMILIES else str(kind)
    known = f"A {title} tower" if kind is not None else f"A tower (model_type {_MISSING})"
    return f"{known}{f' ({name})' if name else ''}{of_layers}"


def _seen(ratio: Any) -> str:
    return _CROPS.get(str(ratio), f"images as {ratio}" if ratio is not None else f"images (crop {_MISSING})")


def _recorded(made: dict[str, Any], name: str, what: str) -> str:
    return str(made[name]) if made.get(name) is not None else f"{what} ({_MISSING})"


def _own_name(made: dict[str, Any]) -> str:
    fields = output.flatten(made) if made else {}
    shown = ", ".join(f"{name} {text}" for name, text in list(fields.items())[:4])
    return f"its fingerprint: {shown}{', ...' if len(fields) > 4 else ''}" if shown else "its fingerprint is empty"


def codec_in_words(values: dict[str, Any]) -> str:
    """Return how features are stored, and what that saves."""
    storage = values["storage_dtype"]
    if storage in QUANTISED:
        return f"{storage} with scales, {values['of_bfloat16']:.0%} of bfloat16's size, rounded"
    if values["fingerprint"].get("compute_dtype") == storage:
        return f"{storage}, the tower's values bit for bit"
    return f"{storage}, without quantisation"


def in_words(values: dict[str, Any]) -> dict[str, str]:
    """Return a summary as names and texts, for the terminal and the report."""
    per_image = format_bytes(values["bytes_per_image"])
    rows = {
        "images": f"{values['images']:,}",
        "complete": "yes" if values["complete"] else "no",
        "quarantined": f"{values['quarantined']:,}",
        "shards": f"{values['shards']:,} of up to {values['images_per_shard']:,} images",
        "size": f"{format_bytes(values['bytes'])}; the features of an image take {per_image}",
        "features": f"{values['tokens']} tokens x {values['width']}, {values['storage_dtype']}",
        "codec": codec_in_words(values),
        "age": _ago(values["age_seconds"]),
        "schema": str(values["schema"]),
    }
    if values["not_recorded"]:
        rows[output.NOT_RECORDED] = ", ".join(values["not_recorded"])
    return rows


def _print(values: dict[str, Any], out: Console) -> None:
    output.print_line(values["made_by"], out)
    if not values["complete"]:
        output.print_line(INCOMPLETE, out, "bold red")
    out.print()
    output.print_names(in_words(values), out)
    title = "fingerprint: changes a value, so it is compared"
    output.print_section(title, output.flatten(values["fingerprint"]), out)
    output.print_section("provenance: only recorded", output.flatten(values["provenance"]), out)
    differing = {name: versions for name, versions in values["shard_software"].items() if len(versions) > 1}
    if differing:
        output.print_section("software that differs between shards", _versions(differing), out)


def _versions(software: dict[str, dict[str, int]]) -> dict[str, str]:
    return {
        name: ", ".join(f"{version} in {counted(count, 'shard')}" for version, count in versions.items())
        for name, versions in software.items()
    }


def _age(cache: FeatureCache) -> int:
    now = datetime.now(UTC)
    try:
        then = datetime.fromisoformat(cache.manifest.provenance["created"])
        return max(0, int((now - then).total_seconds()))
    except (KeyError, TypeError, ValueError):  # without a valid date: when the manifest was last replaced
        folder = cache.storage.folder
        return 0 if folder is None else max(0, int(now.timestamp() - (folder / MANIFEST).stat().st_mtime))


def _ago(seconds: int) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return counted(seconds // length, unit)
    return "less than a minute"
