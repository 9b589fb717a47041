"""Frozen LLM + projector: splice, and the loss over caption positions only; knows nothing of files or optimizers.

Shapes: B samples, T ids, L patch tokens, D tower width, H LLM width, V vocabulary; N = T - 1 + L spliced positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from llava_twophase.constants import IGNORE_INDEX


class LlavaProjectorModel(nn.Module):
    """LLaVA's stage 1: the only parameters are the projector's.

    The LLM is deliberately no submodule: whatever walks over a module's parameters (optimizers, DeepSpeed's broadcasts
    and casts, DDP, checkpoints) sees the projector alone, so a checkpoint has nothing frozen in it.

    Args:
        llm: A frozen causal LM, already on its device.
        mm_projector: Maps ``[B, L, D]`` to ``[B, L, H]``.
        image_at: Position of the image token in ``input_ids``: 1 behind a BOS, else 0.
        image_tokens: L, the positions that the image token becomes; only what is logged needs it.
        encode: For on-the-fly mode: ``uint8 [B, S, S, 3]`` to ``[B, L, D]`` without gradient.
    """

    mm_projector: nn.Module
    llm: Any

    def __init__(
        self,
        llm: Any,
        mm_projector: nn.Module,
        image_at: int = 1,
        image_tokens: int = 0,
        encode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.image_at, self.image_tokens = image_at, image_tokens
        self.mm_projector = mm_projector
        object.__setattr__(self, "llm", llm.requires_grad_(False))
        self._encode = encode

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        features: torch.Tensor | None = None,
        crops: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the loss of a batch.

        Args:
            input_ids: int64 ``[B, T]``, right-padded, one image token each at the same position.
            labels: int64 ``[B, T]``, -100 where nothing is learnt.
            features: ``[B, L, D]`` from the cache, in any float dtype.
            crops: ``uint8 [B, S, S, 3]`` instead, for on-the-fly mode.

        Returns:
            ``loss``: float32 scalar, the mean over the batch's caption tokens, as LLaVA's per-device loss.
        """
        if features is None:
            assert self._encode is not None and crops is not None, "a batch has features, or crops and a tower"
            features = self._encode(crops)
        embeds = self.splice(input_ids, features)  # [B, N, H]
        image_at = self.image_at
        # Indices, not a number: a slice would not be contiguous, and the output embedding copied for each sample.
        # The last image position predicts the caption's first token; logits before it would be thrown away.
        kept = torch.arange(embeds.shape[1] - input_ids.shape[1] + image_at, embeds.shape[1], device=embeds.device)
        logits = self.llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=kept).logits  # [B, kept, V]
        targets = labels[:, image_at + 1 :]  # [B, kept - 1]
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)
        return {"loss": loss}

    def splice(self, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Replace the image token by projected features.

        Args:
            input_ids: int64 ``[B, T]``.
            features: ``[B, L, D]``.

        Returns:
            ``[B, N, H]`` in the LLM's dtype.
        """
        dtype = next(self.mm_projector.parameters()).dtype
        projected = self.mm_projector(features.to(dtype))  # [B, L, H]
        text = self.llm.get_input_embeddings()(input_ids.clamp(min=0))  # [B, T, H]
        return torch.cat([text[:, : self.image_at], projected.to(text.dtype), text[:, self.image_at + 1 :]], dim=1)

    def train(self, mode: bool = True) -> LlavaProjectorModel:
        """Set the mode of projector and LLM; the LLM's recomputation works in training mode only."""
        super().train(mode)
        self.llm.train(mode)
        return self

    @property
    def config(self) -> Any:
        """The LLM's configuration, where DeepSpeed's "auto" values come from."""
        return self.llm.config.get_text_config()

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the LLM's activations in the backward pass; Trainer calls it for ``--gradient_checkpointing``."""
        self.llm.activation_checkpointing_enable(**kwargs)
