"""What is in a cache, in words and numbers, for people and for programs; changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llava_twophase.cache.format import FORMAT, SCHEMA
from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.verify import Problem
from llava_twophase.errors import UserError

SAMPLE_ROWS = 64
SAMPLE_SEED = 0
_SHOWN_PROBLEMS = 100


def summary(path: str | Path) -> dict[str, Any]:
    """Describe a cache without reading it whole.

    Args:
        path: The cache's directory; its extraction may be incomplete.

    Returns:
        JSON values; see the README for the names.

    Raises:
        UserError: There is no cache, or it is damaged.
    """
    cache = FeatureCache(path, allow_incomplete=True)
    tokens, width = cache.feature_shape
    values = {
        "path": str(path),
        "format": FORMAT,
        "schema": SCHEMA,
        "complete": cache.manifest.complete,
        "made_by": in_words(cache),
        "images": len(cache),
        "shards": len(cache.manifest.shards),
        "bytes": sum(shard.file_bytes for shard in cache.manifest.shards),
        "bytes_per_image": cache.codec.row_bytes,
        "storage_dtype": cache.dtype,
        "tokens": tokens,
        "width": width,
        "images_per_shard": cache.manifest.images_per_shard,
        "quarantined": len(read_quarantine(cache.path)),
        "statistics": statistics(cache),
        "fingerprint": cache.fingerprint,
        "provenance": cache.manifest.provenance,
    }
    cache.close()
    return values


def statistics(cache: FeatureCache, rows: int = SAMPLE_ROWS, seed: int = SAMPLE_SEED) -> dict[str, Any]:
    """Measure a seeded sample of rows.

    Args:
        cache: The cache.
        rows: Size of the sample; all rows where there are fewer.
        seed: Picks them.

    Returns:
        ``rows``, ``of``, ``seed``; ``mean``, ``std``, ``min``, ``max`` of the finite values and ``token_norm``, the
        mean norm of finite tokens (None where there are none); ``non_finite``, how many values are inf or NaN.
    """
    names = cache.column("image_key")
    picked = np.sort(np.random.default_rng(seed).choice(len(names), min(rows, len(names)), replace=False))
    count, total, squares, low, high, bad, norms = 0, 0.0, 0.0, np.inf, -np.inf, 0, 0.0
    tokens = 0
    for position in picked:
        values = cache.values([bytes(names[position]).decode("utf-8")])[0].astype(np.float64)
        finite = np.isfinite(values)  # [L, D]
        kept, whole = values[finite], values[finite.all(axis=1)]
        bad += values.size - kept.size
        count, total, squares = count + kept.size, total + kept.sum(), squares + np.square(kept).sum()
        low, high = min(low, kept.min(initial=np.inf)), max(high, kept.max(initial=-np.inf))
        tokens, norms = tokens + len(whole), norms + np.linalg.norm(whole, axis=1).sum()
    mean = total / count if count else None
    return {
        "rows": len(picked),
        "of": len(names),
        "seed": seed,
        "mean": mean,
        "std": float(np.sqrt(max(squares / count - mean * mean, 0.0))) if mean is not None else None,
        "min": float(low) if count else None,
        "max": float(high) if count else None,
        "token_norm": float(norms / tokens) if tokens else None,
        "non_finite": bad,
    }


def in_words(cache: FeatureCache) -> str:
    """Say in one sentence what made a cache, as far as its fingerprint tells."""
    tokens, width = cache.feature_shape
    made = cache.fingerprint
    tower = made.get("tower")
    tower = tower if isinstance(tower, dict) else {}
    kinds = {"clip_vision_model": "CLIP", "siglip_vision_model": "SigLIP", "dinov2": "DINOv2"}
    kind = kinds.get(str(tower.get("model_type")), str(tower.get("model_type", "unknown")))
    named = cache.manifest.provenance.get("vision_tower")
    crops = {"square": "the centre square of each image", "pad": "each image padded to a square"}
    features = {"patch": "without the CLS token", "cls_patch": "with the CLS token"}
    ratio, feature = made.get("image_aspect_ratio"), made.get("select_feature")
    dtype, layer = made.get("compute_dtype", "an unknown dtype"), made.get("select_layer", "?")
    return (
        f"A {kind} tower{f' ({named})' if named else ''} of {tower.get('num_hidden_layers', '?')} layers saw "
        f"{crops.get(str(ratio), f'images as {ratio}')} in {dtype}; kept is its hidden state "
        f"{layer} {features.get(str(feature), f'({feature})')}: "
        f"{tokens} tokens of {width} for each image, stored as {cache.dtype}."
    )


def find_row(cache: FeatureCache, key: str) -> int:
    """Return an image's place in row order.

    Raises:
        UserError: It is not in the cache; names images that are called alike.
    """
    row = int(cache.find([key])[0])
    if row >= 0:
        return row
    names = cache.column("image_key")
    alike = names[np.char.endswith(names, b"/" + Path(key).name.encode("utf-8", "surrogateescape"))][:3]
    examples = [bytes(name).decode("utf-8", "replace") for name in (alike if len(alike) else names[:3])]
    raise UserError(
        f"image key {key!r} is not in {cache.path}; a key is a path relative to the image folder, "
        f"{'perhaps' if len(alike) else 'such as'} {' or '.join(map(repr, examples))}"
    )


def console() -> Console:
    """Return where results go; text that the output's encoding lacks is escaped, never an error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(file=sys.stdout, markup=False, highlight=False, emoji=False)


def print_summary(values: dict[str, Any], out: Console) -> None:
    """Print a summary for people."""
    print_line(values["made_by"], out)
    if not values["complete"]:
        print_line("INCOMPLETE: the extraction was cut or is under way; run the same extraction command again.", out)
    per_image, measured = values["bytes_per_image"], values["statistics"]
    out.print()
    _table(
        {
            "images": f"{values['images']:,}",
            "complete": "yes" if values["complete"] else "no",
            "quarantined": f"{values['quarantined']:,}",
            "shards": f"{values['shards']:,} of up to {values['images_per_shard']:,} images",
            "size": f"{_size(values['bytes'])}; the features of an image take {_size(per_image)}",
            "features": f"{values['tokens']} tokens x {values['width']}, {values['storage_dtype']}",
            "schema": str(values["schema"]),
        },
        out,
    )
    chosen = f"{measured['rows']:,} of {measured['of']:,} images, seed {measured['seed']}"
    names = {"mean": "mean", "std": "std", "min": "min", "max": "max", "token_norm": "mean token norm"}
    numbers = {shown: "-" if measured[name] is None else f"{measured[name]:.6g}" for name, shown in names.items()}
    _section(f"statistics of a sample ({chosen})", {**numbers, "non-finite values": f"{measured['non_finite']:,}"}, out)
    _section("fingerprint", _flat(values["fingerprint"]), out)
    _section("provenance", _flat(values["provenance"]), out)


def print_problems(path: str, problems: Iterable[Problem], out: Console) -> None:
    """Print what ``verify`` found, a line each, the notes last."""
    found = sorted(problems, key=lambda problem: problem.note)
    for problem in found[:_SHOWN_PROBLEMS]:
        print_line(f"{'note: ' if problem.note else ''}{problem.file}: {problem.what}; {problem.fix}", out)
    if len(found) > _SHOWN_PROBLEMS:
        print_line(f"... and {len(found) - _SHOWN_PROBLEMS:,} more; --json lists all", out)
    wrong = sum(not problem.note for problem in found)
    if wrong:
        print_line(f"{path}: {wrong:,} problem{'s' if wrong > 1 else ''} found", out)


def printable(text: str) -> str:
    """Escape what is no visible character: keys and file names may hold a terminal's control sequences."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def print_line(text: str, out: Console) -> None:
    """Print one line, never broken by us: a pipe gets a line for each thing, a terminal breaks it itself."""
    out.print(printable(text), soft_wrap=True)


def _section(title: str, rows: dict[str, str], out: Console) -> None:
    out.print()
    print_line(title, out)
    _table(rows, out)


def _table(rows: dict[str, str], out: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(printable(f"  {name}"), printable(value))
    with out.capture() as capture:
        out.print(table)
    out.out("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        inner = (_flat(part, f"{name}.{key}" if name else str(key)) for key, part in value.items())
        return {key: text for rows in inner for key, text in rows.items()}
    return {name: value if isinstance(value, str) else repr(value)}


def _size(count: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3f} {unit}"
    return f"{count} bytes"
