"""Find out what a trained projector belongs to: its file, LLM, vision tower and settings."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_twophase.errors import UserError

_PROJECTOR = "mm_projector.bin"


@dataclass(frozen=True)
class TrainedProjector:
    """A projector file and the settings that it was trained with.

    Attributes:
        path: ``mm_projector.bin`` or another file with its weights.
        projector_type: ``linear`` or ``mlpNx_gelu``.
        llm: Folder or hub id of the base LLM.
        vision_tower: Folder or hub id of the vision tower.
        select_layer: Hidden state of the tower that the projector reads; -2 is the second to last.
        select_feature: ``patch`` (without the CLS token) or ``cls_patch``.
        image_aspect_ratio: ``square`` or ``pad``.
        llm_dtype: Dtype that the LLM ran in; None where it is not recorded.
        tower_dtype: Dtype that the tower ran in; None where it is not recorded.
    """

    path: Path
    projector_type: str
    llm: str
    vision_tower: str
    select_layer: int
    select_feature: str
    image_aspect_ratio: str
    llm_dtype: str | None = None
    tower_dtype: str | None = None

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the projector's tensors under the names of its module: ``0.weight``, ``0.bias``, ``2.weight``, ..."""
        return projector_weights(self.path)


def find_projector(
    run: str | Path, llm: str | None = None, vision_tower: str | None = None, **overrides: Any
) -> TrainedProjector:
    """Find the projector of a run, and the settings that it was trained with.

    Args:
        run: An ``--output_dir``, or a projector file; a ``config.json`` beside the file is used.
        llm: ``--model_name_or_path``; overrides what the configuration says.
        vision_tower: ``--vision_tower``; overrides what the configuration says.
        overrides: ``select_layer``, ``select_feature`` or ``image_aspect_ratio``; None keeps the recorded value.

    Returns:
        The projector with all settings.

    Raises:
        UserError: There is no projector, or its LLM or tower is neither recorded nor given.
    """
    path = Path(run)
    if path.is_dir():
        path = path / _PROJECTOR
    if not path.is_file():
        hint = "the run has not finished, or it is a checkpoint" if path.parent.is_dir() else "it does not exist"
        raise UserError(f"{run}: no {_PROJECTOR} there ({hint}); expected an --output_dir or a projector file")
    config, arguments = _json(path.with_name("config.json")), _json(path.with_name("arguments.json"))
    cache = _json(path.with_name("feature_cache.json"))
    llm = llm or config.get("_name_or_path")
    vision_tower = vision_tower or config.get("mm_vision_tower")
    absent = [flag for flag, value in (("--model_name_or_path", llm), ("--vision_tower", vision_tower)) if not value]
    if absent:
        raise UserError(
            f"{run}: config.json beside it does not say which models it belongs to; give {' and '.join(absent)}"
        )
    training = arguments.get("training", {})
    recorded = {
        "select_layer": config.get("mm_vision_select_layer", -2),
        "select_feature": config.get("mm_vision_select_feature", "patch"),
        "image_aspect_ratio": config.get("image_aspect_ratio") or "square",
    }
    recorded.update({name: value for name, value in overrides.items() if value is not None})
    return TrainedProjector(
        path=path,
        projector_type=config.get("mm_projector_type") or _type_of(projector_weights(path)),
        llm=str(llm),
        vision_tower=str(vision_tower),
        llm_dtype=("bfloat16" if training.get("bf16") else "float16" if training.get("fp16") else "float32")
        if training
        else None,
        tower_dtype=cache.get("fingerprint", {}).get("compute_dtype"),
        **recorded,
    )


def projector_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a projector file, whatever prefix its names have.

    Args:
        path: ``mm_projector.bin`` of LLaVA or of this project, or a file with these tensors of a stage-2 checkpoint.

    Returns:
        Tensors on the CPU, named as in the module: ``weight`` and ``bias`` for ``linear``, else ``0.weight``, ...

    Raises:
        UserError: The file cannot be read or has no projector weights.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets
        raise UserError(f"{path} cannot be read as a projector file: {error}") from None
    named = state.items() if isinstance(state, dict) else ()
    found = {str(name).split("mm_projector.")[-1]: value for name, value in named if "mm_projector." in str(name)}
    if not found:
        raise UserError(f"{path} has no mm_projector weights; expected LLaVA's mm_projector.bin")
    return found


def _type_of(weights: dict[str, torch.Tensor]) -> str:
    if set(weights) == {"weight", "bias"}:
        return "linear"
    layers = sorted(int(match[1]) for name in weights if (match := re.fullmatch(r"(\d+)\.weight", name)))
    if layers != list(range(0, 2 * len(layers), 2)):
        raise UserError(f"these projector weights are neither linear nor mlpNx_gelu: {sorted(weights)}")
    return f"mlp{len(layers)}x_gelu"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}
