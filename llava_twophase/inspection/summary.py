"""``summary``: what made a cache, and how large it is, without reading features."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_twophase.cache.format import FORMAT, MANIFEST, QUANTISED, SCHEMA
from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.inspection import output
from llava_twophase.text import format_bytes

INCOMPLETE = "INCOMPLETE: the extraction was cut or is under way; run the same extraction command again."
_TOWERS = {"clip_vision_model": "CLIP", "siglip_vision_model": "SigLIP", "dinov2": "DINOv2"}
_CROPS = {"square": "the centre square of each image", "pad": "each image padded to a square"}
_FEATURES = {"patch": "without the CLS token", "cls_patch": "with the CLS token"}


def run(args: argparse.Namespace) -> int:
    """Print a summary."""
    values, out = summary(args.cache), output.console()
    if args.json:
        output.print_json(values, out)
    else:
        _print(values, out)
    return 0


def summary(path: str | Path) -> dict[str, Any]:
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
    }


def made_by(cache: FeatureCache) -> str:
    """Say in one sentence what made a cache, as far as its fingerprint tells."""
    tokens, width = cache.feature_shape
    made = cache.fingerprint
    tower = made.get("tower")
    tower = tower if isinstance(tower, dict) else {}
    kind = _TOWERS.get(str(tower.get("model_type")), str(tower.get("model_type", "unknown")))
    named = cache.manifest.provenance.get("vision_tower")
    ratio, feature = made.get("image_aspect_ratio"), made.get("select_feature")
    dtype, layer = made.get("compute_dtype", "an unknown dtype"), made.get("select_layer", "?")
    return (
        f"A {kind} tower{f' ({named})' if named else ''} of {tower.get('num_hidden_layers', '?')} layers saw "
        f"{_CROPS.get(str(ratio), f'images as {ratio}')} in {dtype}; kept is its hidden state "
        f"{layer} {_FEATURES.get(str(feature), f'({feature})')}: "
        f"{tokens} tokens of {width} for each image, stored as {cache.dtype}."
    )


def codec_in_words(values: dict[str, Any]) -> str:
    """Say how features are stored, and what that saves."""
    if values["storage_dtype"] not in QUANTISED:
        return f"{values['storage_dtype']}, the tower's values bit for bit"
    return f"{values['storage_dtype']} with scales, {values['of_bfloat16']:.0%} of bfloat16's size, rounded"


def in_words(values: dict[str, Any]) -> dict[str, str]:
    """Turn a summary into names and texts, for the terminal and the report."""
    per_image = format_bytes(values["bytes_per_image"])
    return {
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


def _print(values: dict[str, Any], out: Console) -> None:
    output.print_line(values["made_by"], out)
    if not values["complete"]:
        output.print_line(INCOMPLETE, out, "bold red")
    out.print()
    output.print_table(([f"  {name}", value] for name, value in in_words(values).items()), out)
    output.print_section("fingerprint: changes a value, so it is compared", output.flat(values["fingerprint"]), out)
    output.print_section("provenance: only recorded", output.flat(values["provenance"]), out)


def _age(cache: FeatureCache) -> int:
    now = datetime.now(timezone.utc)
    try:
        then = datetime.fromisoformat(cache.manifest.provenance["created"])
        return max(0, int((now - then).total_seconds()))
    except (KeyError, TypeError, ValueError):  # a clock of its own, or none: when the manifest was last replaced
        return max(0, int(now.timestamp() - (cache.path / MANIFEST).stat().st_mtime))


def _ago(seconds: int) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = seconds // length
            return f"{count:,} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"
