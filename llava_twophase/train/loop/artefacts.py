"""The files of a finished run: ``mm_projector.bin``, LLaVA's ``config.json``, arguments, fingerprint and loss curve."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from llava_twophase.files import replace_file
from llava_twophase.plots import loss_figure, missing_matplotlib
from llava_twophase.records import Record
from llava_twophase.train.arguments import Arguments
from llava_twophase.train.flags import plain
from llava_twophase.train.model.projector import FILE, save_projector
from llava_twophase.train.stage_2 import LLAVA_MODEL_TYPES, LLAVA_NEXT_MODEL_TYPES

logger = logging.getLogger(__name__)

CONFIG = "config.json"
HELD_OUT = "held_out.json"
"""The records that ``--eval_fraction`` holds out, in LLaVA's layout."""
ARTEFACTS = (CONFIG, FILE)
"""The files that LLaVA reads. A finished run has all of them."""
MODEL_TYPES = LLAVA_MODEL_TYPES | LLAVA_NEXT_MODEL_TYPES


def llava_config(
    base: PretrainedConfig, arguments: Arguments, mm_hidden_size: int, projector: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the trained model's ``config.json`` as LLaVA writes it.

    Args:
        base: The LLM's configuration.
        arguments: The run's arguments.
        mm_hidden_size: Tower width, 1024 for CLIP-L; the sum of all widths for joined towers.
        projector: Further fields of a projector that LLaVA does not have.

    Returns:
        The LLM's own fields under their old and new names, and LLaVA's fields. For joined towers, ``mm_vision_tower``
        is a list, which LLaVA does not load, and ``mm_interpolate_patch_grid`` is added.
    """
    model, data, training = arguments.model, arguments.data, arguments.training
    config = base.to_dict()
    # transformers 5 renamed these; 4.37 would silently use its defaults.
    rope = config.get("rope_parameters") or {}
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    config["rope_scaling"] = _rope_scaling(rope)
    config["torch_dtype"] = config.get("dtype")
    config |= {
        "_name_or_path": model.model_name_or_path,
        "architectures": base.architectures,
        "model_type": MODEL_TYPES.get(base.model_type, f"llava_{base.model_type}"),
        "freeze_mm_mlp_adapter": training.freeze_mm_mlp_adapter,
        "image_aspect_ratio": data.image_aspect_ratio,
        "mm_hidden_size": mm_hidden_size,
        "mm_patch_merge_type": model.mm_patch_merge_type,
        "mm_projector_lr": training.mm_projector_lr,
        "mm_projector_type": model.mm_projector_type,
        "mm_use_im_patch_token": model.mm_use_im_patch_token,
        "mm_use_im_start_end": model.mm_use_im_start_end,
        "mm_vision_select_feature": model.mm_vision_select_feature,
        "mm_vision_select_layer": model.select_layer,
        "mm_vision_tower": plain(model.vision_tower),
        "tokenizer_model_max_length": training.model_max_length,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": True,
        "use_mm_proj": True,
        **(projector or {}),
    }
    if len(model.vision_tower) > 1:
        config["mm_interpolate_patch_grid"] = model.interpolate_patch_grid
    if model.s2:
        config |= {"s2": True, "s2_scales": model.s2_scales}  # as LLaVA's vision tower reads them
    if model.mm_tunable_parts is not None:
        config["mm_tunable_parts"] = model.mm_tunable_parts
    return config


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        # transformers 4.37 refuses any further field.
        return {"type": kind, "factor": rope["factor"]}
    return {"type": kind, **{name: value for name, value in rope.items() if name != "rope_theta"}}


def write_artefacts(
    folder: Path,
    projector: nn.Module,
    config: dict[str, Any],
    arguments: Arguments,
    image_tokens: int,
    features: dict[str, Any] | None,
) -> Path:
    """Write the files of a finished run, except ``trainer_state.json`` and ``finished.json``.

    Args:
        folder: The output folder.
        projector: The trained projector.
        config: As ``llava_config`` returns it.
        arguments: The run's arguments, as typed and with all defaults, written as ``arguments.json``.
        image_tokens: Positions that an image takes, which ``arguments.json`` records too.
        features: Fingerprint of the feature cache or of the joined caches, written as ``feature_cache.json``; None for
            on-the-fly runs.

    Returns:
        The projector's file, which is written last.
    """
    write_json(folder / CONFIG, config)
    write_json(folder / "arguments.json", {**arguments.to_dict(), "projector": {"image_tokens": image_tokens}})
    if features is not None:
        write_json(
            folder / "feature_cache.json", {"path": plain(arguments.data.feature_cache), "fingerprint": features}
        )
    draw_losses(folder / "trainer_state.json", folder / "loss.png")
    return save_projector(projector, folder)


def write_held_out(folder: Path, records: Sequence[Record]) -> None:
    """Write the records that ``--eval_fraction`` holds out, for evaluations after the run.

    Args:
        folder: The output folder.
        records: The held-out records, in the order of the data file.
    """
    write_json(folder / HELD_OUT, [record.to_llava() for record in records])


def draw_losses(state: Path, picture: Path) -> None:
    """Draw the loss over the steps if matplotlib is installed."""
    reason = missing_matplotlib()
    if reason:
        logger.info("no %s: %s", picture.name, reason)
        return
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    loss_figure({"loss": history}).savefig(picture, dpi=120)


def write_json(path: Path, content: Any) -> None:
    """Write or replace a JSON file."""
    with replace_file(path, "w") as file:
        json.dump(content, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")
