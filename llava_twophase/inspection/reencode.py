"""``reencode``: the tower run again over a sample of images, against what the cache holds.

It answers whether the cache is what this machine would make now: bit for bit, or up to what dtype and device explain.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from tqdm import tqdm

from llava_twophase.cache.fingerprint import differences
from llava_twophase.errors import UserError, combined_error
from llava_twophase.inspection import output
from llava_twophase.inspection.compare import distance
from llava_twophase.inspection.rows import Rows

if TYPE_CHECKING:
    from llava_twophase.vision.tower import VisionTower

EXPLAINED = 16.0
"""Relative error, in units of the compute dtype's epsilon, up to which other kernels explain a difference: rounding
adds up over some dozens of layers. Another layer, crop or checkpoint is far beyond it."""
_BATCH = 8
_WORST = 5


def run(args: argparse.Namespace) -> int:
    """Print what came out; 1 where a difference is not explained."""
    rows, out = Rows(args.cache), output.console()
    values = reencode(rows, args)
    if args.json:
        output.print_json({"path": args.cache, **values}, out)
    else:
        _print(values, out)
    return 0 if values["verdict"] in ("equal", "explained") else 1


def reencode(rows: Rows, args: argparse.Namespace) -> dict[str, Any]:
    """Run the fingerprint's tower over a sample.

    Args:
        rows: The cache.
        args: ``image_folder``, ``n``, ``seed``, ``vision_tower`` (None for the one that provenance names), ``device``.

    Returns:
        JSON values; ``verdict`` is ``equal``, ``explained`` or ``different``.

    Raises:
        UserError: The tower is not the fingerprint's, or no image of the sample is what it was.
    """
    from llava_twophase.vision.images import BadImage, decode, open_images

    images = open_images(args.image_folder)
    tower = _tower(rows, args.vision_tower, args.device)
    picked = rows.sample(args.n, args.seed)
    kept: list[int] = []
    crops: list[np.ndarray] = []
    changed: list[str] = []
    found: dict[str, list[np.ndarray]] = {}
    with tqdm(total=len(picked), unit="image", desc="reencode", disable=None) as bar:
        for row, key in zip(picked.tolist(), rows.keys(picked), strict=True):
            bar.update()
            try:
                data = images.read(key)
                if hashlib.sha256(data).digest() != rows.digest(row):
                    raise BadImage("changed")
                crops.append(tower.preprocessor.crop(decode(data)))
                kept.append(row)
            except BadImage:
                changed.append(key)
            if len(crops) == _BATCH or (row == picked[-1] and crops):
                for name, part in _measure(rows, np.array(kept[-len(crops) :]), crops, tower).items():
                    found.setdefault(name, []).append(part)
                crops = []
    if not kept:
        raise UserError(f"none of {len(picked)} images of {args.image_folder} is the file that was encoded")
    return _verdict(rows, tower, kept, changed, {name: np.concatenate(parts) for name, parts in found.items()})


def _tower(rows: Rows, name: str | None, device: str) -> VisionTower:
    import torch

    from llava_twophase.vision.preprocess import Preprocessor
    from llava_twophase.vision.tower import VisionTower

    cache, made = rows.cache, rows.cache.fingerprint
    name = name or cache.manifest.provenance.get("vision_tower")
    if not isinstance(name, str):
        raise UserError(f"{cache.path} does not name its tower; give --vision_tower")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        dtype = getattr(torch, str(made["compute_dtype"]))
        settings = (str(made["image_aspect_ratio"]), int(made["select_layer"]), str(made["select_feature"]))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"the fingerprint of {cache.path} does not say how features were made: {error!r}") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {str(error).partition(chr(10))[0]}") from None
    tower = VisionTower(name, Preprocessor(name, settings[0]), settings[1], settings[2], dtype, device)
    different = differences(made, tower.fingerprint(), ("the cache", "this tower"))
    if different:
        raise combined_error(different, f"{name} is not the tower that made {cache.path}; give it as --vision_tower")
    return tower


def _measure(rows: Rows, part: np.ndarray, crops: list[np.ndarray], tower: VisionTower) -> dict[str, np.ndarray]:
    import torch

    codec = rows.cache.codec
    stored = rows.stored(part)
    fresh = tower.encode(torch.from_numpy(np.stack(crops))).cpu()  # [B, L, D]
    again = codec.to_rows(fresh).numpy()
    measured = distance(codec.to_numpy(again), codec.to_numpy(stored))
    # What the codec itself rounds, of which two roundings of nearly equal values can differ by.
    rounding = distance(codec.to_numpy(again), fresh.float().numpy())["relative_error"]
    return {**measured, "rounding": rounding, "equal": (again == stored).all(1)}


def _verdict(
    rows: Rows, tower: VisionTower, kept: list[int], changed: list[str], found: dict[str, np.ndarray]
) -> dict[str, Any]:
    import torch

    errors = found["relative_error"]
    allowed = EXPLAINED * torch.finfo(tower.dtype).eps + found["rounding"]
    worst = [place for place in np.argsort(-errors, kind="stable")[:_WORST] if errors[place]]
    software = rows.cache.manifest.provenance.get("software")
    software = software if isinstance(software, dict) else {}
    device = torch.cuda.get_device_name() if tower.device.type == "cuda" else platform.machine()
    equal = bool(found["equal"].all())
    keys = rows.keys(kept)
    return {
        "verdict": "equal" if equal else "explained" if (errors <= allowed).all() else "different",
        "vision_tower": tower.name,
        "rows": len(kept),
        "equal_images": int(found["equal"].sum()),
        "changed_images": changed,
        "cosine": {"mean": float(found["cosine"].mean()), "min": float(found["cosine"].min())},
        "relative_error": {"mean": float(errors.mean()), "max": float(errors.max())},
        "max_error": float(found["max_error"].max()),
        "explained_up_to": float(allowed.max()),
        "compute_dtype": str(tower.dtype).removeprefix("torch."),
        "device": {"then": software.get("device"), "now": device},
        "torch": {"then": software.get("torch"), "now": torch.__version__},
        "worst": [[keys[place], float(found["cosine"][place]), float(errors[place])] for place in worst],
    }


def _print(values: dict[str, Any], out: Console) -> None:
    rows, dtype = values["rows"], values["compute_dtype"]
    verdicts = {
        "equal": (f"bit-equal: all {rows:,} images, encoded again, are what the cache holds", "bold green"),
        "explained": (
            f"equal up to rounding: {dtype} and another device or version explain it",
            "bold green",
        ),
        "different": (f"DIFFERENT: more than {dtype} and another device explain", "bold red"),
    }
    output.print_line(*verdicts[values["verdict"]][:1], out, verdicts[values["verdict"]][1])
    relative, cosine = values["relative_error"], values["cosine"]
    shown = {
        "bit-equal images": f"{values['equal_images']:,} of {rows:,}",
        "images changed since": f"{len(values['changed_images']):,}"
        + (f", such as {values['changed_images'][0]}" if values["changed_images"] else ""),
        "cosine of tokens": f"{cosine['mean']:.6f}, of the worst image {cosine['min']:.6f}",
        "relative error": f"{relative['mean']:.3g}, of the worst image {relative['max']:.3g}; explained up to "
        f"{values['explained_up_to']:.3g}",
        "largest difference": output.number(values["max_error"]),
    }
    for name in ("device", "torch"):
        then, now = values[name]["then"] or "not recorded", values[name]["now"]
        shown[name] = now if then == now else f"{then} then, {now} now"
    out.print()
    output.print_table(([f"  {name}", value] for name, value in shown.items()), out)
    if values["worst"]:
        out.print()
        table = ([key, f"{near:.6f}", f"{error:.3g}"] for key, near, error in values["worst"])
        output.print_table(table, out, ("worst images", "cosine", "relative error"))
