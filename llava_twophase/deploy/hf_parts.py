"""The models that an export to Hugging Face combines, and whether transformers' LLaVA can hold them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor

from llava_twophase.deploy.trained_projector import TrainedProjector
from llava_twophase.deploy.weights import model_folder, tensor_names
from llava_twophase.errors import UserError
from llava_twophase.layers import as_tuple

TOWERS = {"clip_vision_model": True, "siglip_vision_model": False, "dinov2": True}
"""Towers that an export holds, by test, and whether they have a CLS token."""
# LLMs whose exported model gives the same logits, by test. transformers' LLaVA has a plain ``lm_head`` after the LLM's
# base model, so families that scale, bias or cap their logits (cohere, phi, gemma2) do not fit.
LLMS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma3_text", "olmo", "olmo2", "phi3")


@dataclass(frozen=True)
class HfParts:
    """What an export combines.

    Attributes:
        projector: The trained projector.
        llm_folder: The LLM's folder.
        tower_folder: The vision tower's folder.
        text_config: The LLM's configuration.
        vision_config: The tower's configuration.
        processor: The tower's image processor.
    """

    projector: TrainedProjector
    llm_folder: Path
    tower_folder: Path
    text_config: Any
    vision_config: Any
    processor: Any

    @property
    def has_cls(self) -> bool:
        """Whether the tower's output begins with a CLS token."""
        return TOWERS[self.vision_config.model_type]

    @property
    def strategy(self) -> str:
        """``vision_feature_select_strategy``: "default" drops the first token, so a tower without CLS needs "full"."""
        return "default" if self.projector.select_feature == "patch" and self.has_cls else "full"

    @property
    def image_tokens(self) -> int:
        """Tokens of one image: the patches of the processor's crop, which may differ from the tower's image size."""
        size = self.processor.crop_size if getattr(self.processor, "do_center_crop", False) else self.processor.size
        patch = self.vision_config.patch_size
        patches = int(size["height"] // patch) * int(size["width"] // patch)
        return patches + (self.projector.select_feature == "cls_patch")


def load_parts(projector: TrainedProjector) -> HfParts:
    """Find the models of a projector and read their configurations.

    Raises:
        UserError: A model cannot be found, transformers' LLaVA does not hold its family, or its configuration cannot be
            read.
    """
    only_tower = projector.only_tower("transformers' LLaVA")
    llm, tower = model_folder(projector.llm, "--model_name_or_path"), model_folder(only_tower, "--vision_tower")
    try:
        text = AutoConfig.from_pretrained(llm).get_text_config()
        vision = AutoConfig.from_pretrained(tower)
        vision = getattr(vision, "vision_config", vision)
        _require_families(text.model_type, vision.model_type)
        processor = AutoImageProcessor.from_pretrained(tower, backend="pil")
    except UserError:
        raise
    except Exception as error:  # of any class, because a configuration file can hold anything
        raise UserError(f"the configuration of {llm} or {tower} cannot be loaded: {error}") from None
    return HfParts(projector, llm, tower, text_config=text, vision_config=vision, processor=processor)


def _require_families(llm: str, tower: str) -> None:
    if tower not in TOWERS:
        raise UserError(
            f"the vision tower is a {tower}; exports hold {', '.join(TOWERS)}. Use the projector with "
            "`llava-use-projector caption`"
        )
    if llm not in LLMS:
        raise UserError(
            f"the LLM is a {llm}; transformers' LLaVA gives the same logits with {', '.join(LLMS)} only. Use the "
            "projector with `llava-use-projector caption`"
        )


def require_expressible(parts: HfParts, weights: dict[str, torch.Tensor]) -> None:
    """Check that transformers' LLaVA can hold projector, tower and LLM, and that they fit together.

    Args:
        parts: The models.
        weights: The projector's tensors.

    Raises:
        UserError: It cannot, or they do not.
    """
    kind, tower, llm = parts.projector.projector_type, parts.vision_config.model_type, parts.text_config.model_type
    if kind != "mlp2x_gelu":
        raise UserError(
            f"the projector is {kind}; transformers' LLaVA has mlp2x_gelu only, so it cannot be exported; "
            "llava-use-projector caption and evaluate run it"
        )
    if parts.projector.s2_scales:
        raise UserError("the projector reads features of several scales (S2), which transformers' LLaVA does not have")
    if parts.projector.select_feature == "cls_patch" and not TOWERS[tower]:
        raise UserError(f"a {tower} has no CLS token, so cls_patch cannot be exported")
    expected = ("model.", "lm_head.weight")
    other = [name for name in tensor_names(parts.llm_folder) if not name.startswith(expected)]
    if other:
        raise UserError(
            f"{parts.llm_folder} has the tensor {other[0]}; expected only {expected[0]}* and {expected[1]}, as a "
            f"causal LLM of the family {llm} has"
        )
    _require_shapes(parts, weights)


def _require_shapes(parts: HfParts, weights: dict[str, torch.Tensor]) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    hidden = parts.text_config.hidden_size
    width = parts.vision_config.hidden_size * len(as_tuple(parts.projector.select_layer))
    expected = {"0.weight": (hidden, width), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    if found != expected:
        raise UserError(
            f"{parts.projector.path} has {found}, but {parts.projector.llm} and {parts.tower_folder} need "
            f"{expected}; give the models that it was trained with"
        )
