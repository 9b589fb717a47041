"""Warnings, before training, about files of the LLM and the tower that LLaVA's stage 2 would read wrongly afterwards.

LLaVA runs on transformers 4.37, which reads the base LLM's own ``config.json`` and the tower's own weights.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llava_twophase.compat import find_file
from llava_twophase.train.arguments import Arguments

logger = logging.getLogger(__name__)

_DEFAULT_THETA = 10000.0


def warn_about_stage_2(arguments: Arguments) -> None:
    """Log what LLaVA's stage 2 would read wrongly; training itself is not affected."""
    model = arguments.model
    path = find_file(model.model_name_or_path, "config.json", arguments.training.cache_dir)
    warnings = [] if path is None else _rope_warnings(Path(path))
    warnings += _tower_warnings(Path(model.vision_tower))
    for warning in warnings:
        logger.warning("%s. This run is not affected, LLaVA's stage 2 is", warning)


def _rope_warnings(path: Path) -> list[str]:
    """Compare the rope fields of transformers 5 with those that 4.37 reads."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    rope = config.get("rope_parameters") or {}
    missing: dict[str, Any] = {}
    theta = rope.get("rope_theta", _DEFAULT_THETA)
    if theta != _DEFAULT_THETA and "rope_theta" not in config:
        missing["rope_theta"] = theta
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "dynamic") and not config.get("rope_scaling"):
        missing["rope_scaling"] = {"type": kind, "factor": rope.get("factor")}
    if not missing:
        return []
    return [
        f"{path} was saved by transformers 5 and has its rotary embedding only in rope_parameters, which transformers "
        f"4.37 ignores: add {json.dumps(missing)[1:-1]}"
    ]


def _tower_warnings(folder: Path) -> list[str]:
    """Look for a CLIP tower whose tensor names transformers 4.37 does not know."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        weights = sorted(folder.glob("*.safetensors"))
        if kind not in ("clip", "clip_vision_model") or not weights:
            return []
        with safe_open(weights[0], framework="pt") as file:
            names = list(file.keys())
    except (OSError, ValueError, AttributeError, SafetensorError):
        return []  # a name on the hub, or files that the tower's own checks report
    if any(name.startswith("vision_model.") for name in names):
        return []
    return [
        f"--vision_tower {folder} was saved by transformers 5: its tensor names lack the prefix vision_model., so "
        "transformers 4.37 would start with random weights; add the prefix, or give stage 2 the original tower"
    ]
