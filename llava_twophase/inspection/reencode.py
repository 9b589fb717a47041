"""``reencode``: run the tower again over a sample of images and compare with the cache.

It answers whether this machine would write the same features now: bit for bit, or up to rounding of dtype and device.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from tqdm import tqdm

from llava_twophase.cache.fingerprint import differences
from llava_twophase.devices import choose_device
from llava_twophase.errors import UserError, combined_error
from llava_twophase.inspection import output
from llava_twophase.inspection.compare import distance, print_worst, worst_images
from llava_twophase.inspection.rows import CheckedRows
from llava_twophase.inspection.summary import not_recorded
from llava_twophase.layers import Layers, as_layers
from llava_twophase.text import agree, counted

if TYPE_CHECKING:
    import torch

    from llava_twophase.vision.sources import ImageSource
    from llava_twophase.vision.tower import VisionTower

EXPLAINED = 16.0
"""Relative error, in units of the compute dtype's epsilon, that other kernels can explain: rounding adds up over some
dozens of layers. Another layer, crop or checkpoint gives far larger errors."""
_BATCH = 8
_NEEDED = (
    "tower.weights_sha256", "processor", "image_aspect_ratio", "compute_dtype", "select_layer", "select_feature",
)  # fmt: skip


def run(path: str, image_folder: str, count: int, seed: int, *, tower: str | None, device: str, as_json: bool) -> int:
    """Print the comparison; return 1 if a difference is not explained."""
    rows = CheckedRows(path)
    images = rows.open_images(image_folder)
    values = reencode(rows, images, load_tower(rows, tower, device), count, seed)
    output.print_result({"path": path, **values}, as_json, lambda out: _print(values, out))
    return 0 if values["verdict"] in ("equal", "explained") else 1


@dataclass
class _Compared:
    # What was found so far; crops wait until they make a batch.
    kept: list[int] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    unverified: int = 0
    crops: list[np.ndarray] = field(default_factory=list)
    measured: dict[str, list[np.ndarray]] = field(default_factory=dict)


def reencode(rows: CheckedRows, images: ImageSource, tower: VisionTower, count: int, seed: int) -> dict[str, Any]:
    """Run a tower over a sample.

    Args:
        rows: The cache.
        images: Where image files are.
        tower: The tower that made the cache.
        count: Images to sample.
        seed: Seed of the sample.

    Returns:
        JSON values; ``verdict`` is ``equal``, ``explained`` or ``different``.

    Raises:
        UserError: All images of the sample are missing, unreadable, or changed since extraction.
    """
    picked = rows.sample(count, seed)
    state = _Compared()
    for row, key in tqdm(
        zip(picked.tolist(), rows.keys(picked), strict=True),
        total=len(picked), unit="image", desc="reencode", disable=None,
    ):  # fmt: skip
        _add_image(rows, images, tower, (row, key), state)
        if len(state.crops) == _BATCH:
            _measure(rows, tower, state)
    if state.crops:
        _measure(rows, tower, state)
    if not state.kept:
        raise UserError(f"none of {counted(len(picked), 'image')} can be compared: missing, damaged, or changed since")
    return _verdict(rows, tower, state)


def load_tower(rows: CheckedRows, name: str | None, device: str) -> VisionTower:
    """Load the tower of a cache and compare its fingerprint.

    Args:
        rows: The cache.
        name: Hub id or folder; None for the one that the cache records.
        device: ``auto``, or a torch device.

    Raises:
        UserError: The cache does not record enough, or this is another tower.
    """
    from llava_twophase.vision.preprocess import Preprocessor
    from llava_twophase.vision.tower import VisionTower

    path, made = rows.cache.path, rows.cache.fingerprint
    dtype, layer = _settings(rows)
    recorded = rows.cache.manifest.provenance.get("vision_tower")
    if name is None and not isinstance(recorded, str):
        raise UserError(f"{path} does not record where its tower is; give it as --vision_tower")
    given, name = name, str(recorded) if name is None else name
    chosen = choose_device(device)
    ratio, feature = str(made["image_aspect_ratio"]), str(made["select_feature"])
    try:
        tower = VisionTower(
            name,
            Preprocessor(name, ratio, made.get("s2_scales", ())),
            select_layer=layer,
            select_feature=feature,
            dtype=dtype,
            device=chosen,
        )
    except UserError as error:
        if given is not None:
            raise
        moved = f"{path} records {name!r} as its tower, which cannot be loaded; if it has moved, give --vision_tower"
        raise UserError(f"{moved} ({error})") from error
    different = differences(made, tower.fingerprint(), ("the cache", "this tower"))
    if different:
        raise combined_error(different, f"{name} is not the tower that made {path}; give that one as --vision_tower")
    return tower


def _settings(rows: CheckedRows) -> tuple[torch.dtype, Layers]:
    import torch

    path, made = rows.cache.path, rows.cache.fingerprint
    missing = not_recorded(made, _NEEDED)
    if missing:
        raise UserError(
            f"{path} cannot be compared with a tower: its fingerprint does not record {', '.join(missing)}; "
            "reencode needs a cache that the extraction command wrote"
        )
    dtype, layer = getattr(torch, str(made["compute_dtype"]), None), made["select_layer"]
    layers = layer if isinstance(layer, list) else [layer]
    if not isinstance(dtype, torch.dtype) or not layers or not all(isinstance(number, int) for number in layers):
        found = f"compute_dtype {made['compute_dtype']!r} and select_layer {layer!r}"
        raise UserError(f"{path} records {found}; expected a torch dtype and an integer")
    return dtype, as_layers(layer)


def _add_image(
    rows: CheckedRows, images: ImageSource, tower: VisionTower, image: tuple[int, str], state: _Compared
) -> None:
    from llava_twophase.vision.images import BadImage, decode

    row, key = image
    source = rows.source(row)
    try:
        data = images.read(key)
        if source is not None and hashlib.sha256(data).digest() != source[1]:
            raise BadImage("it changed")
        state.crops.append(tower.preprocessor.crop(decode(data)))
    except BadImage:
        state.unusable.append(key)
        return
    state.kept.append(row)
    state.unverified += source is None


def _measure(rows: CheckedRows, tower: VisionTower, state: _Compared) -> None:
    import torch

    codec = rows.cache.codec
    stored = rows.stored(np.array(state.kept[-len(state.crops) :]))
    features = tower.encode(torch.from_numpy(np.stack(state.crops))).cpu()  # [B, L, D]
    again = codec.to_rows(features).numpy()
    measured = distance(codec.to_numpy(again), codec.to_numpy(stored))
    # Rounding by the codec: two roundings of nearly equal values can differ by it.
    rounding = distance(codec.to_numpy(again), features.float().numpy())["relative_error"]
    for name, part in {**measured, "rounding": rounding, "equal": (again == stored).all(1)}.items():
        state.measured.setdefault(name, []).append(part)
    state.crops = []


def _verdict(rows: CheckedRows, tower: VisionTower, state: _Compared) -> dict[str, Any]:
    import torch

    found = {name: np.concatenate(parts) for name, parts in state.measured.items()}
    errors = found["relative_error"]
    allowed = EXPLAINED * torch.finfo(tower.dtype).eps + found["rounding"]
    software = rows.cache.manifest.provenance.get("software")
    software = software if isinstance(software, dict) else {}
    device = torch.cuda.get_device_name() if tower.device.type == "cuda" else platform.machine()
    equal = bool(found["equal"].all())
    return {
        "verdict": "equal" if equal else "explained" if (errors <= allowed).all() else "different",
        "vision_tower": tower.name,
        "rows": len(state.kept),
        "equal_images": int(found["equal"].sum()),
        "changed_images": state.unusable,
        "unverified_images": state.unverified,
        "cosine": {"mean": float(found["cosine"].mean()), "min": float(found["cosine"].min())},
        "relative_error": {"mean": float(errors.mean()), "max": float(errors.max())},
        "max_error": float(found["max_error"].max()),
        "explained_up_to": float(allowed.max()),
        "compute_dtype": str(tower.dtype).removeprefix("torch."),
        "device": {"then": software.get("device"), "now": device},
        "torch": {"then": software.get("torch"), "now": torch.__version__},
        "worst": worst_images(rows.keys(state.kept), found),
    }


def _print(values: dict[str, Any], out: Console) -> None:
    rows, dtype = values["rows"], values["compute_dtype"]
    verdicts = {
        "equal": f"bit-equal: {counted(rows, 'image')} {agree(rows, 'gives', 'give')} the features in the cache",
        "explained": f"equal up to rounding: {dtype} and another device or version explain the differences",
        "different": f"DIFFERENT: by more than {dtype} and another device explain",
    }
    style = "bold red" if values["verdict"] == "different" else "bold green"
    output.print_line(verdicts[values["verdict"]], out, style)
    relative, cosine, unusable = values["relative_error"], values["cosine"], values["changed_images"]
    shown = {
        "bit-equal images": f"{values['equal_images']:,} of {rows:,}",
        "images missing or changed": f"{len(unusable):,}" + (f", such as {unusable[0]}" if unusable else ""),
        "cosine of tokens": f"{cosine['mean']:.6f}, of the worst image {cosine['min']:.6f}",
        "relative error": f"{relative['mean']:.3g}, of the worst image {relative['max']:.3g}; explained up to "
        f"{values['explained_up_to']:.3g}",
        "largest difference": output.number(values["max_error"]),
    }
    if values["unverified_images"]:
        shown["image file not recorded"] = f"{values['unverified_images']:,}"
    for name in ("device", "torch"):
        then, now = values[name]["then"] or output.NOT_RECORDED, values[name]["now"]
        shown[name] = now if then == now else f"{then} then, {now} now"
    out.print()
    output.print_names(shown, out)
    print_worst(values["worst"], out)
