"""``handover``: check everything that LLaVA's stage 2 reads from a run and its models, and print its command.

LLaVA 1.2 runs on transformers 4.37 and LLaVA-NeXT on 4.40; both read the base LLM's and the tower's own files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_twophase.deploy.hf_parts import TOWERS
from llava_twophase.deploy.trained_projector import TrainedProjector
from llava_twophase.deploy.weights import model_folder
from llava_twophase.errors import UserError
from llava_twophase.layers import as_tuple, describe
from llava_twophase.projectors.names import is_llava
from llava_twophase.train.model.projector import projector_type
from llava_twophase.train.stage_2 import (
    LLAVA_MODEL_TYPES,
    LLAVA_NEXT_MODEL_TYPES,
    Problem,
    generation_config_problem,
    layers_problem,
    rope_problem,
    tower_problem,
)


@dataclass(frozen=True)
class Check:
    """One checked property.

    Attributes:
        what: What was checked.
        found: What was found.
        fix: What to do; empty if nothing is wrong.
    """

    what: str
    found: str
    fix: str = ""


def handover(projector: TrainedProjector, as_json: bool) -> int:
    """Print the checks and the command of LLaVA's stage 2.

    Args:
        projector: The trained projector.
        as_json: Print one JSON object; its command is null for a projector that LLaVA cannot load.

    Returns:
        0, or 1 if a check found a problem.
    """
    checks = list(run_checks(projector))
    command = stage_2_command(projector)
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in checks], "command": command}, indent=1))
    else:
        for check in checks:
            fix = f"; {check.fix}" if check.fix else ""
            print(f"{'PROBLEM' if check.fix else 'ok':<8} {check.what}: {check.found}{fix}")
        if command is not None:
            print("\nLLaVA's stage 2, in its repository (scripts/v1_5/finetune.sh has the rest of the recipe):\n")
            print(command)
    return 1 if any(check.fix for check in checks) else 0


def run_checks(projector: TrainedProjector) -> Iterator[Check]:
    """Check the projector, the base LLM and the tower.

    Raises:
        UserError: A model's folder cannot be found or read, or the projector reads joined features.
    """
    only_tower = projector.only_tower("LLaVA (also LLaVA-NeXT)")
    llm, tower = model_folder(projector.llm, "--model_name_or_path"), model_folder(only_tower, "--vision_tower")
    base, vision = _config(llm, "text_config"), _config(tower, "vision_config")
    yield _check_projector(projector, base, vision)
    yield _check_base(base)
    yield _check("rope", rope_problem(llm / "config.json"), "fields that transformers 4.37 reads")
    yield _check("generation_config.json", generation_config_problem(str(llm)), "valid, or there is none")
    yield _check_tokenizer(llm, base)
    yield _check_tower(tower, vision)
    if projector.s2_scales:
        yield Check("s2", "LLaVA from c121f04 and LLaVA-NeXT read S2 features, with the package s2wrapper")
    yield _check("mm_vision_select_layer", layers_problem(projector.select_layer), describe(projector.select_layer))
    yield Check(
        "image_aspect_ratio",
        f"trained with {projector.image_aspect_ratio}; LLaVA's recipe trains stage 1 with square and stage 2 with pad",
    )


def stage_2_command(projector: TrainedProjector) -> str | None:
    """Return the command of LLaVA's stage 2 with the flags that depend on this run.

    None for a projector that LLaVA does not have, and for features of several layers, of which LLaVA reads one.
    """
    if not is_llava(projector.projector_type) or len(as_tuple(projector.select_layer)) > 1:
        return None
    flags = [
        f"--model_name_or_path {projector.llm}",
        "--version v1",
        "--data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data",
        f"--vision_tower {projector.only_tower('LLaVA')}",
        f"--pretrain_mm_mlp_adapter {projector.path}",
        f"--mm_projector_type {projector.projector_type}",
        f"--mm_vision_select_layer {as_tuple(projector.select_layer)[0]}",
        f"--mm_vision_select_feature {projector.select_feature}",
        *([f"--s2 True --s2_scales {','.join(map(str, projector.s2_scales))}"] if projector.s2_scales else []),
        "--mm_use_im_start_end False --mm_use_im_patch_token False",
        "--image_aspect_ratio pad --group_by_modality_length True",
        "--bf16 True --output_dir ./checkpoints/llava-v1.5-finetuned",
    ]
    return " \\\n    ".join(["deepspeed llava/train/train_mem.py --deepspeed ./scripts/zero3.json", *flags])


def _check_projector(projector: TrainedProjector, base: dict[str, Any], vision: dict[str, Any]) -> Check:
    if not is_llava(projector.projector_type):
        return Check(
            "projector",
            projector.projector_type,
            "LLaVA has linear and mlpNx_gelu only and refuses others; llava-use-projector caption and evaluate run it",
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in projector.weights().items() if tensor.ndim == 2}
    hidden, width = base.get("hidden_size"), vision.get("hidden_size", 0) * len(as_tuple(projector.select_layer))
    width *= max(1, len(projector.s2_scales))
    first, last = next(iter(shapes.values())), list(shapes.values())[-1]
    found = f"{projector.projector_type}, {first[1]} -> {last[0]}"
    stored = projector_type(projector.weights())
    if stored != projector.projector_type:
        return Check(
            "projector",
            found,
            f"{projector.path} holds a {stored}; correct mm_projector_type of config.json or give the right file",
        )
    if (first[1], last[0]) == (width, hidden):
        return Check("projector", found)
    return Check(
        "projector", found, f"the tower gives {width} and the LLM takes {hidden}: use the models it was trained with"
    )


def _check_base(base: dict[str, Any]) -> Check:
    kind = str(base.get("model_type"))
    if kind in LLAVA_MODEL_TYPES:
        return Check("base LLM", f"{kind}, which LLaVA 1.2 loads")
    if kind in LLAVA_NEXT_MODEL_TYPES:
        return Check("base LLM", f"{kind}, which LLaVA-NeXT loads and LLaVA 1.2 does not")
    known = ", ".join((*LLAVA_MODEL_TYPES, *LLAVA_NEXT_MODEL_TYPES))
    return Check("base LLM", kind, f"neither LLaVA nor LLaVA-NeXT loads it ({known}); use: export --to hf")


def _check(what: str, problem: Problem | None, otherwise: str) -> Check:
    return Check(what, otherwise) if problem is None else Check(what, problem.found, problem.fix)


def _check_tokenizer(folder: Path, base: dict[str, Any]) -> Check:
    if base.get("model_type") in ("llama", "mistral") and not (folder / "tokenizer.model").is_file():
        return Check(
            "tokenizer",
            "no tokenizer.model",
            "LLaVA loads the slow tokenizer, which needs it; copy it from the base model",
        )
    return Check("tokenizer", "readable by LLaVA")


def _check_tower(folder: Path, vision: dict[str, Any]) -> Check:
    kind = str(vision.get("model_type", "clip"))
    if kind.startswith("clip"):
        return _check("vision tower", tower_problem(folder), f"{kind}, whose weights transformers 4.37 reads")
    if kind.startswith("siglip"):
        return Check("vision tower", f"{kind}, which LLaVA-NeXT loads; LLaVA 1.2 loads CLIP towers only")
    use = "export --to hf" if kind in TOWERS else "llava-use-projector caption"
    return Check("vision tower", kind, f"LLaVA loads CLIP towers, LLaVA-NeXT also SigLIP; use: {use}")


def _config(folder: Path, part: str) -> dict[str, Any]:
    # A multimodal model has the LLM's fields under text_config, the tower's under vision_config.
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}") from None
    return dict(content.get(part) or content)
