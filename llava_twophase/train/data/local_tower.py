"""Compare a feature cache with the vision tower that the user names, if that tower is on this machine.

Training from a cache needs neither the tower nor the network: nothing is downloaded, and a tower that is missing is not
an error. The fingerprint of the tower is computed on the CPU, and kept for later runs if that takes long.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from llava_twophase import __version__
from llava_twophase.cache.fingerprint import differences
from llava_twophase.errors import UserError
from llava_twophase.files import replace_file

logger = logging.getLogger(__name__)

_WEIGHT_FILES = ("*.safetensors", "*.bin")
# Seconds; CLIP-L/14-336 takes more than this.
_WORTH_KEEPING = 1.0
_COMPUTE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TowerSettings:
    """The flags that decide which features a run trains on.

    Attributes:
        vision_tower: Hub id or folder of the tower.
        select_layer: Which hidden state.
        select_feature: ``patch`` or ``cls_patch``.
        image_aspect_ratio: ``square`` or ``pad``.
    """

    vision_tower: str
    select_layer: int
    select_feature: str
    image_aspect_ratio: str


def find_tower(name: str) -> Path | None:
    """Return the folder of a tower whose weights are on this machine: ``name``, or its snapshot in the hub cache."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            config = try_to_load_from_cache(name, "config.json")
        except HFValidationError:  # a path
            return None
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    return folder if any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES) else None


def compare_with_tower(fingerprint: dict[str, Any], settings: TowerSettings) -> list[str] | None:
    """Compare the fingerprint of a cache with a tower on this machine: weights, configuration and image processor.

    Args:
        fingerprint: The cache's.
        settings: The run's flags.

    Returns:
        One line for each field that differs; None if the tower or a hash of its weights is missing.
    """
    tower, dtype = fingerprint.get("tower"), fingerprint.get("compute_dtype")
    if not isinstance(tower, dict) or "weights_sha256" not in tower or dtype not in _COMPUTE_DTYPES:
        return None
    folder = find_tower(settings.vision_tower)
    if folder is None:
        return None
    try:
        local = _tower_fingerprint(folder, settings, dtype)
    except (UserError, OSError) as error:
        logger.warning("--vision_tower %s cannot be compared with the cache: %s", settings.vision_tower, error)
        return None
    # Only fields that both have: another version of this package may record more.
    found: dict[str, Any] = {
        name: _common(fingerprint[name], local[name]) for name in ("tower", "processor") if name in fingerprint
    }
    expected = {name: _common(local[name], fingerprint[name]) for name in found}
    return differences(found, expected, ("the cache", f"--vision_tower {settings.vision_tower}"))


def _common(one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: value for name, value in one.items() if name in other}
    return one


def _tower_fingerprint(folder: Path, settings: TowerSettings, dtype: str) -> dict[str, Any]:
    """Return a tower's fingerprint, from an earlier run if none of its files has changed."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    flags = {**asdict(settings), "vision_tower": str(folder.resolve())}
    releases = [__version__, version("transformers")]
    key = hashlib.sha256(json.dumps([flags, dtype, files, releases]).encode("utf-8", "surrogateescape")).hexdigest()
    stored = _memory() / f"{key}.json"
    try:
        return dict(json.loads(stored.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        pass
    started = time.perf_counter()
    fingerprint = _compute_fingerprint(folder, settings, dtype)
    if time.perf_counter() - started < _WORTH_KEEPING:
        return fingerprint
    try:
        stored.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(stored, "w") as file:
            json.dump(fingerprint, file)
    except OSError:
        pass  # a home that cannot be written: the next run computes it again
    return fingerprint


def _compute_fingerprint(folder: Path, settings: TowerSettings, dtype: str) -> dict[str, Any]:
    import torch

    from llava_twophase.vision.preprocess import Preprocessor
    from llava_twophase.vision.tower import VisionTower

    tower = VisionTower(
        name=str(folder),
        preprocessor=Preprocessor(str(folder), settings.image_aspect_ratio),
        select_layer=settings.select_layer,
        select_feature=settings.select_feature,
        dtype=getattr(torch, dtype),
        device="cpu",
    )
    return tower.fingerprint()


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava-twophase" / "towers"
