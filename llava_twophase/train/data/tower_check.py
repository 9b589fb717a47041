"""Compare a feature cache with the flags of a run, and with the vision tower that they name if it is on this machine.

Training from a cache needs neither the tower nor the network: nothing is downloaded, and a tower that is missing is not
an error. The fingerprint of the tower is computed on the CPU, and kept for later runs if that takes long.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from llava_twophase import __version__
from llava_twophase.cache.fingerprint import differences
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.errors import UserError, combined_error
from llava_twophase.files import replace_file
from llava_twophase.layers import Layers, from_the_end
from llava_twophase.shared_arrays import user_cache
from llava_twophase.text import counted

logger = logging.getLogger(__name__)

_WEIGHT_FILES = ("*.safetensors", "*.bin")
# Seconds; CLIP-L/14-336 takes more than this.
_WORTH_KEEPING = 1.0
# Increased when kept fingerprints are computed in another way. 2: not from weights that ZeRO-3 had partitioned.
_KEPT_FORMAT = 2
_FLAGS = {
    "select_layer": "--mm_vision_select_layer",
    "select_feature": "--mm_vision_select_feature",
    "image_aspect_ratio": "--image_aspect_ratio",
    "s2_scales": "--s2 and --s2_scales",
}
_COMPUTE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TowerSettings:
    """The flags that decide which features a run trains on.

    Attributes:
        vision_tower: Hub id or folder of the tower.
        select_layer: Which hidden state, or several whose channels are concatenated.
        select_feature: ``patch`` or ``cls_patch``.
        image_aspect_ratio: ``square`` or ``pad``.
        s2_scales: Scales of ``--s2 True`` in pixels, smallest first; none without it.
    """

    vision_tower: str
    select_layer: Layers
    select_feature: str
    image_aspect_ratio: str
    s2_scales: tuple[int, ...] = ()


def check_all_settings(caches: Sequence[FeatureCache], settings: Sequence[TowerSettings]) -> None:
    """Check each cache against the settings of its tower, and log what could not be compared.

    Raises:
        UserError: The numbers of caches and towers differ, or a cache does not match: all that do not are reported, or
            the order that matches.
    """
    if len(caches) != len(settings):
        raise UserError(
            f"{counted(len(caches), 'feature cache')} and {counted(len(settings), 'vision tower')} were given; "
            "expected the cache of each tower, in the same order"
        )
    results = [_compare(cache, part) for cache, part in zip(caches, settings, strict=True)]
    problems = [problem for problem, _ in results if problem]
    if problems:
        raise UserError(_other_order(caches, settings) or "\n".join(problems))
    for note in [note for _, note in results if note]:
        logger.info(note)


def _other_order(caches: Sequence[FeatureCache], settings: Sequence[TowerSettings]) -> str | None:
    """Return a message if the caches belong to the towers in another order."""
    fits = [[_compare(cache, part)[0] is None for part in settings] for cache in caches] if len(caches) > 1 else []
    for order in permutations(range(len(caches))):
        if fits and all(fits[cache][tower] for tower, cache in enumerate(order)):
            return (
                "--feature_cache has another order than --vision_tower; for the towers "
                f"{' '.join(part.vision_tower for part in settings)}, expected the caches "
                f"{' '.join(str(caches[position].path) for position in order)}"
            )
    return None


def _compare(cache: FeatureCache, settings: TowerSettings) -> tuple[str | None, str | None]:
    """Compare the flags with the fields that the fingerprint has. The one of a ``CacheWriter`` may be any JSON object.

    Returns:
        What differs, if something does; otherwise, what could not be compared, if there is such a thing.
    """
    fingerprint, tower = cache.fingerprint, cache.fingerprint.get("tower")
    layers = tower.get("num_hidden_layers") if isinstance(tower, dict) else None
    given = {
        "select_layer": from_the_end(settings.select_layer, layers),
        "select_feature": settings.select_feature,
        "image_aspect_ratio": settings.image_aspect_ratio,
    }
    found = {name: fingerprint[name] for name in given.keys() & fingerprint.keys()}
    if "select_layer" in found:
        found["select_layer"] = from_the_end(found["select_layer"], layers)
    if settings.s2_scales or "s2_scales" in fingerprint:
        found["s2_scales"], given["s2_scales"] = fingerprint.get("s2_scales", []), list(settings.s2_scales)
    lines = differences(found, {name: given[name] for name in found})
    different = [f"{line} ({_FLAGS[line.partition(':')[0]]})" for line in lines]
    compared = None if different else compare_with_tower(fingerprint, settings)
    if different or compared:
        return _different(cache, settings.vision_tower, different or compared or []), None
    recorded = cache.manifest.provenance.get("vision_tower")
    if compared is None and recorded and not _may_be_same(str(recorded), settings.vision_tower):
        return _another_name(cache, str(recorded), settings.vision_tower), None
    return None, _unchecked(
        cache, settings.vision_tower, [name for name in given if name not in found], compared is None
    )


def _different(cache: FeatureCache, name: str, lines: list[str]) -> str:
    recorded = str(cache.manifest.provenance.get("vision_tower") or name)
    if any(line.startswith("tower.weights_sha256: ") for line in lines) and not _may_be_same(recorded, name):
        return (
            f"{cache.path} was made from {recorded}, whose weights differ from those of --vision_tower {name}; give "
            f"--vision_tower {recorded}, or a cache of {name}"
        )
    return str(
        combined_error(lines, f"{cache.path} was made with different settings; use those, or extract another cache")
    )


def _another_name(cache: FeatureCache, recorded: str, name: str) -> str:
    download = "" if _is_path(name) else f", or download it: hf download {name}"
    return (
        f"{cache.path} was made from {recorded}, not from --vision_tower {name}, which is not on this machine, so "
        f"weights cannot be compared; give --vision_tower {recorded}, or, if it is the same tower, its folder{download}"
    )


def _may_be_same(recorded: str, name: str) -> bool:
    """Return whether two names can be spellings of one tower that is not on this machine: its hub id and its folder."""
    one, other = os.path.normpath(recorded), os.path.normpath(name)
    if one == other:
        return True
    if _is_path(name) and not Path(name).exists():
        return False
    return os.path.basename(one) == os.path.basename(other) and (_is_path(recorded) or _is_path(name))


def _is_path(name: str) -> bool:
    """Return whether a name cannot be a hub id of the form owner/name."""
    return name.startswith((".", "/", "~")) or name.strip("/").count("/") != 1


def _unchecked(cache: FeatureCache, name: str, unchecked: list[str], tower_unchecked: bool) -> str | None:
    """Return what was not compared, and another name of the tower: its content decides, not its name."""
    tower = cache.fingerprint.get("tower")
    hashed = isinstance(tower, dict) and "weights_sha256" in tower
    made_by = cache.manifest.provenance.get("vision_tower") or (tower.get("name") if isinstance(tower, dict) else tower)
    other = "" if made_by in (None, name) else f" The cache was made from {made_by!r}."
    if not hashed:
        unchecked = [*unchecked, "tower.weights_sha256"]
    if unchecked:
        return f"{cache.path}: not compared, since its fingerprint does not have them: {', '.join(unchecked)}.{other}"
    if tower_unchecked:
        return (
            f"{cache.path}: only settings were compared, not the tower's weights: --vision_tower {name} is not on this "
            f"machine.{other}"
        )
    return f"{cache.path}: --vision_tower {name} has the weights of the cache's tower.{other}" if other else None


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
    releases = [__version__, version("transformers"), _KEPT_FORMAT]
    key = hashlib.sha256(json.dumps([flags, dtype, files, releases]).encode("utf-8", "surrogateescape")).hexdigest()
    stored = user_cache("towers") / f"{key}.json"
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
        preprocessor=Preprocessor(str(folder), settings.image_aspect_ratio, settings.s2_scales),
        select_layer=settings.select_layer,
        select_feature=settings.select_feature,
        dtype=getattr(torch, dtype),
        device="cpu",
    )
    return tower.fingerprint()
