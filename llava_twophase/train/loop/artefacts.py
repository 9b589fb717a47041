"""What a run leaves in its folder: LLaVA's ``config.json`` beside ``mm_projector.bin``, and how it came about."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from llava_twophase.files import replace_file
from llava_twophase.plots import loss_figure, missing_matplotlib
from llava_twophase.train.arguments import Arguments
from llava_twophase.train.model.projector import save_projector

logger = logging.getLogger(__name__)

_MODEL_TYPES = {"llama": "llava_llama", "mistral": "llava_mistral"}


def llava_config(base: PretrainedConfig, arguments: Arguments, mm_hidden_size: int) -> dict[str, Any]:
    """Describe the trained model as LLaVA does.

    Args:
        base: The LLM's configuration.
        arguments: The run's arguments.
        mm_hidden_size: Tower width, 1024 for CLIP-L.

    Returns:
        The content of ``config.json``: the LLM's own fields under their old and new names, and LLaVA's.
    """
    model, data, training = arguments.model, arguments.data, arguments.training
    config = base.to_dict()
    # transformers 5 renamed these; 4.37 would fall back to its defaults, and a wrong rope theta goes unnoticed.
    rope = dict(config.get("rope_parameters") or {})
    config["rope_theta"] = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", "default")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, "rope_type": kind, **rope}
    config["torch_dtype"] = config.get("dtype")
    config |= {
        "_name_or_path": model.model_name_or_path,
        "architectures": base.architectures,
        "model_type": _MODEL_TYPES.get(base.model_type, f"llava_{base.model_type}"),
        "freeze_mm_mlp_adapter": training.freeze_mm_mlp_adapter,
        "image_aspect_ratio": data.image_aspect_ratio,
        "mm_hidden_size": mm_hidden_size,
        "mm_patch_merge_type": model.mm_patch_merge_type,
        "mm_projector_lr": training.mm_projector_lr,
        "mm_projector_type": model.mm_projector_type,
        "mm_use_im_patch_token": model.mm_use_im_patch_token,
        "mm_use_im_start_end": model.mm_use_im_start_end,
        "mm_vision_select_feature": model.mm_vision_select_feature,
        "mm_vision_select_layer": model.mm_vision_select_layer,
        "mm_vision_tower": model.vision_tower,
        "tokenizer_model_max_length": training.model_max_length,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": model.tune_mm_mlp_adapter,
        "use_mm_proj": True,
    }
    return config


def write_artefacts(
    folder: Path, projector: nn.Module, config: dict[str, Any], arguments: Arguments, features: dict[str, Any] | None
) -> Path:
    """Write all that a run leaves besides ``trainer_state.json``.

    Args:
        folder: The output folder.
        projector: The trained projector.
        config: As ``llava_config`` makes it.
        arguments: The run's arguments, as typed and with all defaults, written as ``arguments.json``.
        features: Fingerprint of the feature cache, written as ``feature_cache.json``; None for on-the-fly runs.

    Returns:
        The projector's file, written last: where it is, the rest is.
    """
    write_json(folder / "config.json", config)
    write_json(folder / "arguments.json", arguments.to_dict())
    if features is not None:
        write_json(folder / "feature_cache.json", {"path": arguments.data.feature_cache, "fingerprint": features})
    draw_losses(folder / "trainer_state.json", folder / "loss.png")
    return save_projector(projector, folder)


def draw_losses(state: Path, picture: Path) -> None:
    """Draw the loss over the steps if matplotlib is installed."""
    reason = missing_matplotlib()
    if reason:
        logger.info("no %s: %s", picture.name, reason)
        return
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    loss_figure({"loss": history}).savefig(picture, dpi=120)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write or replace a JSON file."""
    with replace_file(path, "w") as file:
        json.dump(content, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")
