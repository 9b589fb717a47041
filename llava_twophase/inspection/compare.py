"""``compare``: two caches of the same images, made with another codec, layer, tower or machine.

Shapes: B images, L tokens, D width.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from rich.console import Console
from tqdm import tqdm

from llava_twophase.cache.fingerprint import differences
from llava_twophase.errors import UserError
from llava_twophase.inspection import output
from llava_twophase.inspection.rows import Rows

_WORST = 5


def run(args: argparse.Namespace) -> int:
    """Print the comparison."""
    values, out = compare(Rows(args.cache), Rows(args.other), args.n, args.seed), output.console()
    if args.json:
        output.print_json({"path": args.cache, "other": args.other, **values}, out)
    else:
        _print(values, out)
    return 0


def distance(one: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """Measure how far features are from others, image by image.

    Args:
        one: float32 ``[B, L, D]``.
        other: The same shape; what relative errors are relative to.

    Returns:
        ``cosine`` (the mean over tokens), ``relative_error`` (of the Frobenius norms) and ``max_error``, each ``[B]``.
    """
    a, b = one.astype(np.float64), other.astype(np.float64)
    tiny = np.finfo(np.float64).tiny
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(-1) / np.maximum(lengths, tiny)  # [B, L]
    cosine = np.where((a == b).all(-1), 1.0, cosine)
    difference = np.abs(a - b)
    error = np.sqrt(np.square(difference).sum((1, 2))) / np.maximum(np.sqrt(np.square(b).sum((1, 2))), tiny)
    return {"cosine": cosine.mean(1), "relative_error": error, "max_error": difference.max((1, 2))}


def compare(rows: Rows, others: Rows, count: int, seed: int) -> dict[str, Any]:
    """Compare a sample of the images that both caches have.

    Args:
        rows: A cache.
        others: Another one, against which errors are measured.
        count: Images to sample.
        seed: Picks them.

    Returns:
        JSON values: ``fingerprint`` (the fields that differ), counts, and where the shapes are equal the distances;
        ``cka``, the linear centred kernel alignment of the images' mean tokens (Kornblith et al. 2019), which needs no
        equal shapes.

    Raises:
        UserError: They have no image in common, or features are not finite.
    """
    common = np.flatnonzero(others.cache.find([*rows.cache.keys()]) >= 0)
    if not len(common):
        raise UserError(f"{rows.cache.path} and {others.cache.path} have no image key in common")
    picked = np.sort(np.random.default_rng(seed).choice(common, min(count, len(common)), replace=False))
    keys = rows.keys(picked)
    partners = others.cache.rows(keys)
    same_shape = rows.cache.feature_shape == others.cache.feature_shape
    found: dict[str, list[float]] = {"cosine": [], "relative_error": [], "max_error": []}
    pooled: list[list[np.ndarray]] = [[], []]
    for place in tqdm(range(len(picked)), unit="image", desc="compare", disable=None):
        one, other = rows.values(picked[[place]]), others.values(partners[[place]])
        if not (np.isfinite(one).all() and np.isfinite(other).all()):
            raise UserError(f"the features of {keys[place]!r} are not finite; verify names all such images")
        pooled[0].append(one[0].mean(0))
        pooled[1].append(other[0].mean(0))
        if same_shape:
            for name, value in distance(one, other).items():
                found[name].append(float(value[0]))
    made = (rows.cache.fingerprint, others.cache.fingerprint)
    both = [{name: part.get(name, {}) for name in sorted({*made[0], *made[1]})} for part in made]
    values: dict[str, Any] = {
        "fingerprint": differences(both[0], both[1], ("the first", "the second")),
        "images": [len(rows.cache), len(others.cache)],
        "common": len(common),
        "rows": len(picked),
        "seed": seed,
        "shapes": [list(rows.cache.feature_shape), list(others.cache.feature_shape)],
        "cka": _cka(np.stack(pooled[0]), np.stack(pooled[1])),
    }
    if not same_shape:
        return values
    errors = np.array(found["relative_error"])
    worst = [place for place in np.argsort(-errors, kind="stable")[:_WORST] if errors[place]]
    return {
        **values,
        "equal_images": int((np.array(found["max_error"]) == 0).sum()),
        "cosine": {"mean": float(np.mean(found["cosine"])), "min": min(found["cosine"])},
        "relative_error": {"mean": float(errors.mean()), "max": float(errors.max())},
        "max_error": max(found["max_error"]),
        "worst": [[keys[place], found["cosine"][place], float(errors[place])] for place in worst],
    }


def _cka(one: np.ndarray, other: np.ndarray) -> float | None:
    a, b = (part.astype(np.float64) - part.mean(0, dtype=np.float64) for part in (one, other))
    # Through the [B, B] Gram matrices: a sample has fewer images than a token has channels.
    grams = a @ a.T, b @ b.T
    length = np.linalg.norm(grams[0]) * np.linalg.norm(grams[1])
    return float((grams[0] * grams[1]).sum() / length) if length else None


def _print(values: dict[str, Any], out: Console) -> None:
    chosen = f"{values['rows']:,} of {values['common']:,} common images, seed {values['seed']}"
    if values["fingerprint"]:
        output.print_line("made otherwise:", out, "bold")
        for line in values["fingerprint"]:
            output.print_line(f"  {line}", out)
    else:
        output.print_line("made alike: the fingerprints are equal", out)
    rows = {"images": "{:,} and {:,}".format(*values["images"])}
    if "cosine" in values:
        rows["bit-equal images"] = f"{values['equal_images']:,} of {values['rows']:,}"
        rows["cosine of tokens"] = f"{values['cosine']['mean']:.6f}, of the worst image {values['cosine']['min']:.6f}"
        relative = values["relative_error"]
        rows["relative error"] = f"{relative['mean']:.3g}, of the worst image {relative['max']:.3g}"
        rows["largest difference"] = output.number(values["max_error"])
    else:
        shapes = " and ".join(f"{tokens} tokens x {width}" for tokens, width in values["shapes"])
        rows["shapes"] = f"{shapes}: too different for errors, only for CKA"
    rows["CKA of mean tokens"] = "-" if values["cka"] is None else f"{values['cka']:.6f}"
    output.print_section(f"a sample ({chosen})", rows, out)
    if values.get("worst"):
        out.print()
        header = ("worst images", "cosine", "relative error")
        table = ([key, f"{cosine:.6f}", f"{error:.3g}"] for key, cosine, error in values["worst"])
        output.print_table(table, out, header)
