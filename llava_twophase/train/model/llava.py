"""Frozen LLM and projector as the model that is trained.

Shapes: B samples, T ids, L patch tokens, L' image tokens (L for LLaVA's own projectors), D tower width, H LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from llava_twophase.constants import IGNORE_INDEX
from llava_twophase.errors import UserError
from llava_twophase.train.model.frozen_llm import FrozenLLM


class LlavaProjectorModel(nn.Module):
    """LLaVA's stage-1 model; its only parameters are the projector's.

    The LLM is deliberately not a submodule. Optimizers, DeepSpeed's broadcasts and casts, DDP and checkpoints see the
    projector alone, so a checkpoint holds no frozen weights.

    Args:
        frozen: The frozen LLM.
        mm_projector: Maps ``[B, L, D]`` to ``[B, L', H]``.
        image_tokens: L', the positions that replace the image token; 0 if they are not known.
        encode: For on-the-fly mode: ``uint8 [B, S, S, 3]`` to ``[B, L, D]`` without gradient.

    Attributes:
        accepts_loss_kwargs: Whether Trainer passes ``num_items_in_batch``.
    """

    mm_projector: nn.Module
    accepts_loss_kwargs = False

    def __init__(
        self,
        frozen: FrozenLLM,
        mm_projector: nn.Module,
        image_tokens: int = 0,
        encode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.frozen = frozen  # not an nn.Module
        self.mm_projector = mm_projector
        self.image_tokens = image_tokens
        self._encode = encode

    # With --torch_compile Trainer compiles the model that it trains. The LLM's layers are compiled on their own;
    # tracing a tower in inference mode, or a function that differentiates inside, would fail.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        features: torch.Tensor | None = None,
        crops: torch.Tensor | None = None,
        lengths: Sequence[int] | None = None,
        weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the loss of a batch.

        Args:
            input_ids: int64 ``[B, T]``, right-padded, one image token in each row at the same position.
            labels: int64 ``[B, T]``, -100 where no loss is computed.
            features: ``[B, L, D]`` from the cache, in any float dtype.
            crops: ``uint8 [B, S, S, 3]`` instead, for on-the-fly mode.
            lengths: Number of ids of each sample, on the host. Without them each micro-batch is padded as the batch is.
            weights: float32 ``[B]``, weight of each token of a sample; the loss is their weighted sum.
            num_items_in_batch: Caption tokens of the optimizer's complete batch, over accumulation steps and devices;
                Trainer passes it with ``--average_tokens_across_devices True``.

        Returns:
            ``loss``: float32 scalar, the mean over the batch's caption tokens, as LLaVA's per-device loss; with
            `num_items_in_batch`, their sum divided by that number.

        Raises:
            UserError: The projector returned another number of tokens than when it was built.
        """
        if features is None:
            assert self._encode is not None and crops is not None, "a batch has features, or crops and a tower"
            features = self._encode(crops)
        loss = self.frozen.loss(self._project(features), input_ids, labels, lengths, weights)
        if num_items_in_batch is not None:
            loss = loss * (labels != IGNORE_INDEX).sum() / num_items_in_batch
        return {"loss": loss}

    def splice(self, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Replace the image token by projected features, for generation.

        Args:
            input_ids: int64 ``[B, T]``.
            features: ``[B, L, D]``.

        Returns:
            ``[B, T - 1 + L', H]`` in the LLM's dtype.
        """
        return self.frozen.splice(self._project(features).to(self.llm.dtype), input_ids)

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        dtype = next(self.mm_projector.parameters()).dtype
        projected: torch.Tensor = self.mm_projector(features.to(dtype))  # [B, L', H]
        if self.image_tokens not in (0, projected.shape[1]):
            raise UserError(
                f"the projector returned {projected.shape[1]} tokens, but {self.image_tokens} when it was built; the "
                "number must be the same for every image"
            )
        return projected

    @property
    def llm(self) -> Any:
        """The frozen LLM as transformers made it."""
        return self.frozen.llm

    @property
    def image_position(self) -> int:
        """Index of the image token in ``input_ids``."""
        return self.frozen.image_position

    @property
    def config(self) -> Any:
        """The LLM's configuration, from which DeepSpeed fills its "auto" values."""
        return self.llm.config.get_text_config()

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Do nothing: Trainer calls this for ``--gradient_checkpointing``, but free memory decides here."""
