"""Cached features in Hugging Face's LLaVA: an exported model runs without its vision tower.

``LlavaForConditionalGeneration`` takes ``mm_encoder_outputs`` in place of ``pixel_values``; this module makes them from
rows of a feature cache, so LoRA, evaluation or stage 2 in Trainer or TRL needs no images and no tower in memory.

Shapes: B samples, L patch tokens, D tower width, H LLM width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from llava_twophase.cache.reader import FeatureCache
from llava_twophase.compat import image_outputs
from llava_twophase.constants import IGNORE_INDEX
from llava_twophase.errors import UserError


def encoder_outputs(model: Any, features: torch.Tensor) -> dict[str, Any]:
    """Project cached features and wrap them as the model expects.

    Args:
        model: An exported ``LlavaForConditionalGeneration``; gradients flow into its projector.
        features: ``[B, L, D]`` from the cache.

    Returns:
        The value of ``mm_encoder_outputs``: a list of ``[L, H]`` tensors in the order of the images.

    Raises:
        UserError: The features have another width than the projector takes.
    """
    projector = _llava(model).multi_modal_projector
    weight = projector.linear_1.weight
    if features.shape[-1] != weight.shape[1]:
        raise UserError(
            f"the features have the width {features.shape[-1]}, but the model's projector takes {weight.shape[1]}; use "
            "the cache of the vision tower that it was trained with"
        )
    projected = projector(features.to(weight.device, weight.dtype))  # [B, L, H]
    return {"image": image_outputs(list(projected))}


def drop_vision_tower(model: Any) -> Any:
    """Replace the vision tower of an exported model by an empty module, to free its memory.

    Args:
        model: An exported ``LlavaForConditionalGeneration``, or a PEFT model of one.

    Returns:
        The model.
    """
    _llava(model).vision_tower = nn.Identity()
    return model


def _llava(model: Any) -> Any:
    # The LlavaModel, which a PEFT model wraps twice.
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


class CachedFeatureCollator:
    """Turn records into batches for an exported model: ids, labels and cached features.

    Args:
        tokenizer: The exported tokenizer.
        cache: Features by image key.
        image_token: Placeholder of one patch position.

    Called with samples ``{"image": key, "text": caption}``, it returns ``input_ids``, ``attention_mask`` and ``labels``
    (int64 ``[B, T]``, -100 at padding and up to the last image token) and ``features`` ``[B, L, D]``.
    """

    def __init__(self, tokenizer: Any, cache: FeatureCache, image_token: str = "<image>") -> None:
        self._tokenizer = tokenizer
        self._cache = cache
        self._image_token = image_token

    def __call__(self, samples: Sequence[Mapping[str, str]]) -> dict[str, torch.Tensor]:
        """Return the batch of some samples."""
        features = self._cache.read_tensor([sample["image"] for sample in samples])
        placeholder = self._image_token * features.shape[1]
        texts = [placeholder + sample["text"] + "\n" for sample in samples]
        batch = self._tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        is_image = batch["input_ids"] == self._tokenizer.convert_tokens_to_ids(self._image_token)
        # Everything up to the last image token: image positions, and a BOS in front of them.
        prompt = is_image.flip(1).cummax(1).values.flip(1)
        unlearned = (batch["attention_mask"] == 0) | prompt
        batch["labels"] = batch["input_ids"].masked_fill(unlearned, IGNORE_INDEX)
        return {**batch, "features": features}
