"""What LLaVA's stage 2 reads from a run's LLM and tower, and reads wrongly.

LLaVA 1.2 runs on transformers 4.37, which reads the base LLM's own ``config.json`` and ``generation_config.json`` and
the tower's own weights. Training warns about problems, ``llava-use-projector handover`` lists all checks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from llava_twophase.compat import find_file
from llava_twophase.layers import Layers, describe
from llava_twophase.train.arguments import Arguments

logger = logging.getLogger(__name__)

LLAVA_MODEL_TYPES = {"llama": "llava_llama", "mistral": "llava_mistral", "mpt": "llava_mpt"}
"""Base LLM: the ``model_type`` that LLaVA 1.2.2 registers for it."""
LLAVA_NEXT_MODEL_TYPES = {
    "gemma": "llava_gemma",
    "mixtral": "llava_mixtral",
    "qwen2": "llava_qwen",
    "qwen2_moe": "llava_qwen_moe",
}
"""Base LLM: the ``model_type`` that only LLaVA-NeXT registers for it."""

_DEFAULT_THETA = 10000.0
_CLIP = ("clip", "clip_vision_model")


@dataclass(frozen=True)
class Problem:
    """Something that stage 2 reads wrongly.

    Attributes:
        found: What was found, with the file.
        fix: What to do.
    """

    found: str
    fix: str


def warn_about_stage_2(arguments: Arguments) -> None:
    """Log what LLaVA's stage 2 would read wrongly; training itself is not affected."""
    model, cache_dir = arguments.model, arguments.training.cache_dir
    if len(model.vision_tower) > 1:
        logger.warning("%s", joined_problem(model.vision_tower))
        return
    (tower,) = model.vision_tower
    problems = [
        generation_config_problem(model.model_name_or_path, cache_dir),
        tower_problem(Path(tower)),
        layers_problem(model.select_layer),
    ]
    path = find_file(model.model_name_or_path, "config.json", cache_dir)
    if path is not None:
        problems.append(rope_problem(Path(path)))
    for problem in filter(None, problems):
        logger.warning("LLaVA's stage 2, not this run: %s; %s", problem.found, problem.fix)


def joined_problem(towers: Sequence[str]) -> str:
    """Return why LLaVA cannot continue from a projector of joined towers, and what can use it."""
    return (
        f"LLaVA's stage 2, not this run: the projector reads the joined features of {len(towers)} vision towers "
        f"({', '.join(towers)}); LLaVA and LLaVA-NeXT have one tower and cannot load it; llava-use-projector caption "
        "and evaluate can"
    )


def rope_problem(path: Path) -> Problem | None:
    """Compare the rope fields of transformers 5 in an LLM's ``config.json`` with those that 4.37 reads."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    rope = config.get("rope_parameters") or {}
    missing: dict[str, Any] = {}
    theta = rope.get("rope_theta", _DEFAULT_THETA)
    if theta != _DEFAULT_THETA and "rope_theta" not in config:
        missing["rope_theta"] = theta
    kind, scaling = rope.get("rope_type", "default"), config.get("rope_scaling")
    if kind in ("linear", "dynamic") and not scaling:
        missing["rope_scaling"] = {"type": kind, "factor": rope.get("factor")}
    if missing:
        return Problem(
            f"{path} was saved by transformers 5 and has its rotary embedding only in rope_parameters, which "
            "transformers 4.37 ignores",
            f"add {json.dumps(missing)[1:-1]}",
        )
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else kind
    if kind not in ("default", "linear", "dynamic"):
        return Problem(f"{path} has {kind} rope scaling, which transformers 4.37 does not know", "use another base LLM")
    if isinstance(scaling, dict) and kind != "default" and set(scaling) != {"type", "factor"}:
        return Problem(
            f"{path} has rope_scaling {json.dumps(scaling)}; transformers 4.37 takes exactly type and factor",
            f"make it {json.dumps({'type': kind, 'factor': scaling.get('factor')})}",
        )
    return None


def generation_config_problem(name: str, cache_dir: str | None = None) -> Problem | None:
    """Check an LLM's ``generation_config.json`` as ``save_pretrained`` of transformers 4.37 does.

    Args:
        name: Folder or hub id of the LLM.
        cache_dir: Folder of hub downloads.
    """
    fix = 'stage 2 would fail at its last save: set "do_sample": true, or remove temperature and top_p'
    try:
        GenerationConfig.from_pretrained(name, cache_dir=cache_dir).validate(strict=True)
    except OSError:
        return None  # there is none
    except (ValueError, TypeError, AttributeError) as error:
        lines = [line.removeprefix("- ") for line in str(error).splitlines() if line.startswith("- ")]
        return Problem(f"{name}: generation_config.json is contradictory: {' '.join(lines) or error}", fix)
    return None


def layers_problem(layers: Layers) -> Problem | None:
    """Check that a projector reads one hidden state: LLaVA's ``mm_vision_select_layer`` is a number."""
    if isinstance(layers, int):
        return None
    return Problem(
        f"the projector reads {describe(layers)}, concatenated on channels; LLaVA reads one hidden state",
        "use: llava-use-projector export --to hf, or train on one layer",
    )


def tower_problem(folder: Path) -> Problem | None:
    """Look for a CLIP tower whose tensor names transformers 4.37 does not know.

    A tower that cannot be read here (a hub id, another weight format) has no problem that this can find.
    """
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        files = sorted(folder.glob("*.safetensors"))
        if kind not in _CLIP or not files:
            return None
        names = [name for path in files for name in _tensor_names(path)]
    except (OSError, ValueError, AttributeError, SafetensorError):
        return None
    if any(name.startswith("vision_model.") for name in names):
        return None
    return Problem(
        f"{folder} was saved by transformers 5: its tensor names lack the prefix vision_model., so transformers 4.37 "
        "would start with random weights",
        "add the prefix, or give stage 2 the original tower",
    )


def _tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
