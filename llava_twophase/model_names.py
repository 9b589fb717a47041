"""Names of models on the command line: folders or hub ids, checked before a library reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_twophase.errors import UserError
from llava_twophase.hub import path_advice
from llava_twophase.vision.families import UNSUPPORTED, refusal

_TOWER_FIELDS = ("vision_config", "image_size", "patch_size")


def require_tower_folder(name: str) -> None:
    """Check that ``--vision_tower`` is a vision tower's folder, or can be a hub id.

    Raises:
        UserError: The folder does not exist, has no ``preprocessor_config.json``, or holds another model, or a tower
            that is known not to fit.
    """
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None  # a hub id, or a file that its reader reports
    if isinstance(config, dict) and "vocab_size" in config and not any(field in config for field in _TOWER_FIELDS):
        raise UserError(
            f"--vision_tower {name} holds a model of type {config.get('model_type')}, expected a vision tower such as "
            "openai/clip-vit-large-patch14-336; an LLM is given as --model_name_or_path"
        )
    kind = _tower_type(name, config if isinstance(config, dict) else {})
    if kind in UNSUPPORTED:
        raise UserError(f"--vision_tower {name} {refusal(kind)}")
    require_model_folder(
        "--vision_tower",
        name,
        "a vision tower",
        file="preprocessor_config.json",
        described="image processor (preprocessor_config.json)",
    )


def _tower_type(name: str, config: dict[str, Any]) -> str:
    # Configurations of timm have no model_type.
    if name.startswith("timm/") or "pretrained_cfg" in config:
        return "timm_wrapper"
    vision = config.get("vision_config")
    return str((vision if isinstance(vision, dict) else config).get("model_type"))


def require_model_folder(flag: str, name: str, expected: str, file: str = "config.json", described: str = "") -> None:
    """Check that a name is a model's folder, or can be a hub id.

    Args:
        flag: The command-line flag that gave it.
        name: Hub id or local folder.
        expected: What the folder should hold, for the message.
        file: A file that such a folder has.
        described: What to call the file, if not by its name.

    Raises:
        UserError: The folder does not exist, or does not have the file.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / file).is_file():
            found = sorted(path.name for path in folder.iterdir())
            listed = ", ".join(found[:5]) + (" ..." if len(found) > 5 else "")
            raise UserError(
                f"{flag} {name} has no {described or file}; expected the folder of {expected}, "
                f"found: {listed or 'no file'}"
            )
    elif folder.exists():
        raise UserError(f"{flag} {name} is a file; expected the folder of {expected}, or a hub id such as owner/name")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise UserError(
            f"{flag} {name}: there is no such folder; expected the folder of {expected}, or a hub id{path_advice(name)}"
        )
