"""``compare``: two caches of the same images, made with another codec, layer, tower or machine.

Shapes: B images, L tokens, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from tqdm import tqdm

from llava_twophase.cache.fingerprint import MISSING, differences
from llava_twophase.errors import UserError
from llava_twophase.inspection import output
from llava_twophase.inspection.rows import CheckedRows

_WORST = 5


def run(path: str, other: str, count: int, seed: int, as_json: bool) -> int:
    """Print the comparison."""
    values = compare(CheckedRows(path), CheckedRows(other), count, seed)
    output.print_result({"path": path, "other": other, **values}, as_json, lambda out: _print(values, out))
    return 0


def distance(one: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """Measure the distance of features, image by image.

    Args:
        one: float32 ``[B, L, D]``.
        other: The same shape; relative errors are relative to it.

    Returns:
        ``cosine`` (mean over tokens), ``relative_error`` (of the Frobenius norms) and ``max_error``, each ``[B]``.
    """
    a, b = one.astype(np.float64), other.astype(np.float64)
    tiny = np.finfo(np.float64).tiny
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(-1) / np.maximum(lengths, tiny)  # [B, L]
    cosine = np.where((a == b).all(-1), 1.0, cosine)
    difference = np.abs(a - b)
    error, length = (np.sqrt(np.square(part).sum((1, 2))) for part in (difference, b))  # [B]
    # Relative to features that are all zero, any difference is infinite.
    error = np.divide(error, length, out=np.where(error > 0, np.inf, 0.0), where=length > 0)
    return {"cosine": cosine.mean(1), "relative_error": error, "max_error": difference.max((1, 2))}


def compare(rows: CheckedRows, others: CheckedRows, count: int, seed: int) -> dict[str, Any]:
    """Compare a sample of the images that two caches have in common.

    Args:
        rows: A cache.
        others: Another cache; errors are relative to it.
        count: Images to sample.
        seed: Seed of the sample.

    Returns:
        JSON values: ``fingerprint`` and ``software`` (the fields that differ), counts, and if the shapes are equal the
        distances; ``cka``, the linear centred kernel alignment of the images' mean tokens (Kornblith et al. 2019),
        which does not need equal shapes.

    Raises:
        UserError: They have no image in common, or features are not finite.
    """
    common = np.flatnonzero(others.cache.find([*rows.cache.keys()]) >= 0)
    if not len(common):
        raise UserError(f"{rows.cache.path} and {others.cache.path} have no image key in common")
    picked = np.sort(np.random.default_rng(seed).choice(common, min(count, len(common)), replace=False))
    found, pooled = _measure(rows, others, picked)
    return {
        "fingerprint": _fields_that_differ(rows.cache.fingerprint, others.cache.fingerprint),
        "software": _fields_that_differ(rows.cache.manifest.software, others.cache.manifest.software),
        "images": [len(rows.cache), len(others.cache)],
        "common": len(common),
        "rows": len(picked),
        "seed": seed,
        "shapes": [list(rows.cache.feature_shape), list(others.cache.feature_shape)],
        "cka": _cka(*pooled),
        **_distances(rows.keys(picked), found),
    }


def worst_images(keys: list[str], found: dict[str, Any], count: int = _WORST) -> list[list[Any]]:
    """Return key, cosine and relative error of the images with the largest errors; images without error are skipped."""
    errors = np.array(found["relative_error"])
    worst = [place for place in np.argsort(-errors, kind="stable")[:count] if errors[place]]
    return [[keys[place], float(found["cosine"][place]), float(errors[place])] for place in worst]


def print_worst(worst: list[list[Any]], out: Console) -> None:
    """Print what ``worst_images`` returned."""
    if worst:
        out.print()
        table = ([key, f"{cosine:.6f}", f"{error:.3g}"] for key, cosine, error in worst)
        output.print_table(table, out, ("worst images", "cosine", "relative error"))


def _fields_that_differ(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    names = sorted({*one, *other})
    both = [{name: made.get(name, {}) for name in names} for made in (one, other)]
    lines = differences(both[0], both[1], ("the first", "the second"))
    return [line.replace(repr(MISSING), output.NOT_RECORDED) for line in lines]


def _measure(
    rows: CheckedRows, others: CheckedRows, picked: np.ndarray
) -> tuple[dict[str, list[float]], tuple[np.ndarray, np.ndarray]]:
    keys = rows.keys(picked)
    partners = others.cache.rows(keys)
    same_shape = rows.cache.feature_shape == others.cache.feature_shape
    found: dict[str, list[float]] = {}
    pooled: list[list[np.ndarray]] = [[], []]
    for place in tqdm(range(len(picked)), unit="image", desc="compare", disable=None):
        one, other = rows.values(picked[[place]]), others.values(partners[[place]])
        if not (np.isfinite(one).all() and np.isfinite(other).all()):
            raise UserError(
                f"the features of {keys[place]!r} are not finite; run verify, which reports all such images"
            )
        pooled[0].append(one[0].mean(0, dtype=np.float64))
        pooled[1].append(other[0].mean(0, dtype=np.float64))
        if same_shape:
            for name, value in distance(one, other).items():
                found.setdefault(name, []).append(float(value[0]))
    return found, (np.stack(pooled[0]), np.stack(pooled[1]))


def _distances(keys: list[str], found: dict[str, list[float]]) -> dict[str, Any]:
    if not found:  # the shapes differ
        return {}
    return {
        "equal_images": found["max_error"].count(0.0),
        "cosine": {"mean": float(np.mean(found["cosine"])), "min": min(found["cosine"])},
        "relative_error": {"mean": float(np.mean(found["relative_error"])), "max": max(found["relative_error"])},
        "max_error": max(found["max_error"]),
        "worst": worst_images(keys, found),
    }


def _cka(one: np.ndarray, other: np.ndarray) -> float | None:
    a, b = (part - part.mean(0) for part in (one, other))
    # By [B, B] Gram matrices: a sample has fewer images than a token has channels.
    grams = a @ a.T, b @ b.T
    length = np.linalg.norm(grams[0]) * np.linalg.norm(grams[1])
    return float((grams[0] * grams[1]).sum() / length) if length else None


def _print(values: dict[str, Any], out: Console) -> None:
    chosen = f"{values['rows']:,} of {values['common']:,} common images, seed {values['seed']}"
    if values["fingerprint"]:
        output.print_line("made with different settings:", out, "bold")
        for line in values["fingerprint"]:
            output.print_line(f"  {line}", out)
    else:
        output.print_line("made with the same settings: the fingerprints are equal", out)
    if values["software"]:
        output.print_line("made with other software:", out, "bold")
        for line in values["software"]:
            output.print_line(f"  {line}", out)
    rows = {"images": "{:,} and {:,}".format(*values["images"])}
    if "cosine" in values:
        rows["bit-equal images"] = f"{values['equal_images']:,} of {values['rows']:,}"
        rows["cosine of tokens"] = f"{values['cosine']['mean']:.6f}, of the worst image {values['cosine']['min']:.6f}"
        relative = values["relative_error"]
        rows["relative error"] = f"{relative['mean']:.3g}, of the worst image {relative['max']:.3g}"
        rows["largest difference"] = output.number(values["max_error"])
    else:
        shapes = " and ".join(f"{tokens} tokens x {width}" for tokens, width in values["shapes"])
        rows["shapes"] = f"{shapes}: errors need equal shapes, CKA does not"
    rows["CKA of mean tokens"] = "-" if values["cka"] is None else f"{values['cka']:.6f}"
    output.print_section(f"a sample ({chosen})", rows, out)
    print_worst(values.get("worst", []), out)
