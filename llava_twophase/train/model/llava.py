"""Frozen LLM + projector, as the one model that is trained; knows nothing of files or optimizers.

Shapes: B samples, T ids, L patch tokens, D tower width, H LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from llava_twophase.constants import IGNORE_INDEX
from llava_twophase.train.model.frozen_llm import FrozenLLM


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
        micro_batch_size: Samples that go through the LLM at once; None chooses by memory.
        recompute: 0 for nothing, k for every k-th layer of the LLM; None chooses by memory.

    Attributes:
        accepts_loss_kwargs: Whether Trainer is to give ``num_items_in_batch``.
        frozen: The LLM as one function; its ``cut`` says how batches go through it.
    """

    mm_projector: nn.Module
    accepts_loss_kwargs = False

    def __init__(
        self,
        llm: Any,
        mm_projector: nn.Module,
        image_at: int = 1,
        image_tokens: int = 0,
        encode: Callable[[torch.Tensor], torch.Tensor] | None = None,
        micro_batch_size: int | None = None,
        recompute: int | None = None,
    ) -> None:
        super().__init__()
        self.image_tokens = image_tokens
        self.mm_projector = mm_projector
        self.frozen = FrozenLLM(llm, image_at, micro_batch_size, recompute)  # no nn.Module
        self._encode = encode

    # With --torch_compile Trainer compiles whatever it trains; but the LLM's layers, where it pays, are compiled by
    # themselves, and tracing a tower in inference mode or a function that differentiates inside would only fail.
    @torch.compiler.disable
    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        features: torch.Tensor | None = None,
        crops: torch.Tensor | None = None,
        lengths: Sequence[int] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the loss of a batch.

        Args:
            input_ids: int64 ``[B, T]``, right-padded, one image token each at the same position.
            labels: int64 ``[B, T]``, -100 where nothing is learnt.
            features: ``[B, L, D]`` from the cache, in any float dtype.
            crops: ``uint8 [B, S, S, 3]`` instead, for on-the-fly mode.
            lengths: Ids of each sample, on the host; without them every micro-batch is padded as the batch is.
            num_items_in_batch: Caption tokens of the optimizer's whole batch, over accumulation steps and devices; what
                Trainer gives for ``--average_tokens_across_devices True``.

        Returns:
            ``loss``: float32 scalar, the mean over the batch's caption tokens, as LLaVA's per-device loss; with
            `num_items_in_batch`, their sum over that number.
        """
        if features is None:
            assert self._encode is not None and crops is not None, "a batch has features, or crops and a tower"
            features = self._encode(crops)
        loss = self.frozen.loss(self._project(features), input_ids, labels, lengths)
        if num_items_in_batch is not None:
            loss = loss * (labels != IGNORE_INDEX).sum() / num_items_in_batch
        return {"loss": loss}

    def splice(self, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Replace the image token by projected features, for who wants to generate from them.

        Args:
            input_ids: int64 ``[B, T]``.
            features: ``[B, L, D]``.

        Returns:
            ``[B, T - 1 + L, H]`` in the LLM's dtype.
        """
        return self.frozen.splice(self._project(features).to(self.llm.dtype), input_ids)

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        dtype = next(self.mm_projector.parameters()).dtype
        return self.mm_projector(features.to(dtype))  # [B, L, H]

    def train(self, mode: bool = True) -> LlavaProjectorModel:
        """Set the mode of projector and LLM; the LLM's recomputation works in training mode only."""
        super().train(mode)
        self.llm.train(mode)
        return self

    @property
    def llm(self) -> Any:
        """The frozen LLM."""
        return self.frozen.llm

    @property
    def image_at(self) -> int:
        """Position of the image token in ``input_ids``."""
        return self.frozen.image_at

    @property
    def config(self) -> Any:
        """The LLM's configuration, where DeepSpeed's "auto" values come from."""
        return self.llm.config.get_text_config()

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Do nothing: Trainer calls it for ``--gradient_checkpointing``, but memory decides what is recomputed."""
