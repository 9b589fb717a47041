"""The frozen LLM as one differentiable function, projected features -> loss.

Nothing in the LLM is trained, so autograd can treat it as a single node. The forward pass splits the batch into
micro-batches and differentiates each one at once; the backward pass returns the gradient that was found. Activations
exist for one micro-batch only, and DDP, ZeRO and gradient accumulation see an ordinary small model.

Shapes: B samples, b of a micro-batch, T ids, L patch tokens, H width, V vocabulary; N = T - 1 + L spliced positions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from llava_twophase.constants import IGNORE_INDEX
from llava_twophase.errors import UserError
from llava_twophase.text import counted, format_bytes
from llava_twophase.train.model.activation_checkpointing import activation_checkpointing, checkpointable_layers
from llava_twophase.train.model.activation_memory import analytic_estimate, free_memory, measure_activations
from llava_twophase.train.model.last_layer import LastLayer, decoder_layers
from llava_twophase.train.model.load_llm import LoadedLLM
from llava_twophase.train.model.loss_with_gradient import loss_with_gradient
from llava_twophase.train.model.micro_batches import (
    MicroBatch,
    MicroBatching,
    choose_micro_batching,
    free_for_activations,
    largest_of_all_ranks,
    saturating_samples,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Batch:
    """Part of a batch, or all of it."""

    features: torch.Tensor  # [b, L, H] in the LLM's dtype
    input_ids: torch.Tensor  # [b, T]
    labels: torch.Tensor  # [b, T]
    weights: torch.Tensor | None  # [b], of each sample's tokens in the loss; None for their mean

    def select(self, index: torch.Tensor, length: int) -> _Batch:
        """Return some samples, and of their ids the first `length`."""
        weights = None if self.weights is None else self.weights[index]
        return _Batch(self.features[index], self.input_ids[index, :length], self.labels[index, :length], weights)


class FrozenLLM:
    """A causal LM whose weights do not change.

    It stays in evaluation mode, without dropout or router noise, so losses depend on the batch alone.

    Args:
        loaded: The LLM, already on its device; its parameters stop requiring gradients.
        image_position: Index of the image token in ``input_ids``: 1 after a BOS, else 0.
        micro_batch_size: Largest number of samples per micro-batch; None chooses by memory.
        checkpoint_every: Activation checkpointing of every k-th layer, 0 for none; None chooses by memory.
        longest: Number of ids of the longest sample of the data set; 0 if only the first batch is known.

    Attributes:
        micro_batching: How batches are split; None until the first batch with gradients has chosen it.
    """

    def __init__(
        self,
        loaded: LoadedLLM,
        image_position: int = 1,
        micro_batch_size: int | None = None,
        checkpoint_every: int | None = None,
        longest: int = 0,
    ) -> None:
        self.llm = loaded.model.requires_grad_(False).eval()
        self.image_position = image_position
        self.micro_batching: MicroBatching | None = None
        self._is_partitioned = loaded.is_partitioned
        self._samples, self._checkpoint_every = micro_batch_size, checkpoint_every
        self._longest = longest
        self._evaluated_samples: int | None = None  # a smaller limit, once a forward pass ran out of memory
        self._layers, self._last_layer = checkpointable_layers(self.llm), LastLayer(self.llm)
        # Gradients of a mean over a batch would underflow in float16. A tensor, so that nothing waits for the device.
        self._scale = torch.tensor(2.0**16 if self.llm.dtype == torch.float16 else 1.0, device=self.llm.device)

    def resume_with(self, saved: MicroBatching) -> None:
        """Split batches as the interrupted run did, unless flags differ; other micro-batches round differently."""
        samples_differ = self._samples not in (None, saved.samples)
        if not samples_differ and self._checkpoint_every in (None, saved.checkpoint_every):
            self.micro_batching = saved

    def compile(self, **options: Any) -> None:
        """Compile the decoder layers, which share one compilation, except the last, which has hooks.

        Args:
            options: Options of ``torch.compile``.
        """
        for layer in decoder_layers(self.llm)[:-1]:
            layer.compile(**options)

    def loss(
        self,
        projected: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        lengths: Sequence[int] | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the mean loss over a batch's caption tokens, which does not depend on the micro-batches.

        Args:
            projected: ``[B, L, H]``, any float dtype.
            input_ids: int64 ``[B, T]``, right-padded.
            labels: int64 ``[B, T]``, -100 where no loss is computed.
            lengths: Number of ids of each sample, on the host. Without them each micro-batch is padded as the batch is.
            weights: float32 ``[B]``, weight of each token of a sample in a sum that takes the place of the mean.

        Returns:
            float32 scalar, differentiable with respect to `projected`; 0 if there is no caption token.

        Raises:
            UserError: One sample does not fit in memory with activation checkpointing of every layer.
        """
        with_gradient = torch.is_grad_enabled() and projected.requires_grad

        def run(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            batch = _Batch(features.detach().to(self.llm.dtype), input_ids, labels, weights)
            # The LLM's weights have the run's dtype already, so autocast would only add casts.
            with torch.autocast(features.device.type, enabled=False):
                return self._run_batch(batch, lengths, with_gradient)

        if not with_gradient:
            return run(projected)[0]
        return loss_with_gradient(projected, run, self._scale)

    def splice(self, features: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Replace the image token of ``[b, T]`` ids by ``[b, L, H]`` features: ``[b, N, H]``."""
        text = self.llm.get_input_embeddings()(input_ids.clamp(min=0))  # [b, T, H]
        return torch.cat([text[:, : self.image_position], features, text[:, self.image_position + 1 :]], dim=1)

    def _run_batch(
        self, batch: _Batch, lengths: Sequence[int] | None, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the loss of a batch, and the scaled gradient of its features if asked for."""
        if with_gradient and self.micro_batching is None:
            self.micro_batching = self._choose(batch)
        # Divided before the sum, as in a mean: a sum of float16 gradients times the scale could overflow. The clamp
        # gives a batch without a caption token (dropped <unk>s only) a loss of 0 instead of 0 / 0.
        tokens = (batch.labels[:, self.image_position + 1 :] != IGNORE_INDEX).sum().clamp(min=1)
        weight = self._scale / tokens if batch.weights is None else self._scale
        total = torch.zeros((), device=batch.features.device)
        gradient = torch.empty_like(batch.features) if with_gradient else None
        # Longest first: a micro-batch holds little padding, and what does not fit is found at once.
        size, longest = batch.input_ids.shape
        lengths = [longest] * size if lengths is None else lengths
        order = sorted(range(size), key=lambda sample: -lengths[sample])
        planned = self._planned_lengths([lengths[sample] for sample in order], batch)
        start = 0
        while start < size:
            micro_batch = self._next(planned[start:], batch, with_gradient)
            chosen = order[start : start + micro_batch.samples]
            index = torch.tensor(chosen).to(batch.features.device, non_blocking=True)
            part = batch.select(index, lengths[chosen[0]])
            done = self._try_micro_batch(part, weight, with_gradient, micro_batch.checkpoint_every)
            if done is None:
                self._reduce(micro_batch, with_gradient)
                continue
            total += done[0]
            if gradient is not None:
                gradient.index_copy_(0, index, done[1])
            start += len(chosen)
        if gradient is not None and self.llm.dtype == torch.float16:
            self._lower_scale(gradient)
        return total, gradient

    def _planned_lengths(self, lengths: list[int], batch: _Batch) -> list[int]:
        # Ranks that share a partitioned LLM must run it equally often: they split by the longest of their samples.
        return largest_of_all_ranks(lengths, batch.features.device) if self._is_partitioned else lengths

    def _next(self, lengths: list[int], batch: _Batch, with_gradient: bool) -> MicroBatch:
        if self.micro_batching is not None:
            micro_batch = self.micro_batching.next(lengths)
        else:
            micro_batch = MicroBatch(min(len(lengths), _saturating(batch.features)), lengths[0], 0)
        if with_gradient:
            return micro_batch
        samples = min(micro_batch.samples, self._evaluated_samples or micro_batch.samples)
        return MicroBatch(samples, lengths[0], checkpoint_every=0)

    def _try_micro_batch(
        self, batch: _Batch, weight: torch.Tensor, with_gradient: bool, checkpoint_every: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return a micro-batch's share of the loss and its scaled gradient; None if it does not fit in memory."""
        skipping = self._last_layer.reading_from(self._first_read(batch))
        try:
            with skipping, activation_checkpointing(self._layers, checkpoint_every):
                return self._run_micro_batch(batch, weight, with_gradient)
        except torch.OutOfMemoryError:
            return None  # handled by the caller: here the traceback still holds the activations

    def _run_micro_batch(
        self, batch: _Batch, weight: torch.Tensor, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not with_gradient:
            return self._summed_loss(batch) * (weight / self._scale), batch.features.new_empty(0)
        with torch.enable_grad():
            leaf = batch.features.detach().requires_grad_()
            loss = self._summed_loss(replace(batch, features=leaf)) * weight
            (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach() / self._scale, gradient

    def _summed_loss(self, batch: _Batch) -> torch.Tensor:
        embeds = self.splice(batch.features, batch.input_ids)  # [b, N, H]
        # By index: a slice of the hidden states is not contiguous, and a frozen output embedding would be multiplied,
        # even copied, once for each sample.
        read = torch.arange(self._first_read(batch), embeds.shape[1] - 1, device=embeds.device)
        logits = self.llm(
            inputs_embeds=embeds, use_cache=False, logits_to_keep=read
        ).logits  # [b, T - image_position - 1, V]
        targets = batch.labels[:, self.image_position + 1 :]  # [b, T - image_position - 1], as logits [..., V]
        flat, reduction = logits.flatten(0, 1).float(), "sum" if batch.weights is None else "none"
        losses = cross_entropy(flat, targets.flatten(), ignore_index=IGNORE_INDEX, reduction=reduction)
        return losses if batch.weights is None else (losses.view_as(targets).sum(1) * batch.weights).sum()

    def _first_read(self, batch: _Batch) -> int:
        # The last image position predicts the caption's first token; no output before it is read.
        return self.image_position + batch.features.shape[1] - 1

    def _choose(self, batch: _Batch) -> MicroBatching:
        """Choose by the memory that one sample's forward pass keeps, equally on all ranks, and log the choice."""
        features, (size, length) = batch.features, batch.input_ids.shape
        by_memory = self._samples is None or self._checkpoint_every is None
        memory = analytic_estimate(self.llm.config.get_text_config(), features.shape[1], features.element_size())
        # A partitioned LLM counts the forward passes through each layer and would miss the backward pass of a trial.
        if by_memory and not self._is_partitioned:
            memory = measure_activations(self.llm, self.splice(features[:1], batch.input_ids[:1]), memory)
        free = free_for_activations(free_memory(features.device), features.nbytes)
        layer, attention, length, negative_free = largest_of_all_ranks(
            [memory.layer, memory.attention, length, -free], features.device
        )
        lengths = (length, max(length, self._longest))
        choice = choose_micro_batching(
            memory=replace(memory, layer=layer, attention=attention),
            lengths=lengths,
            batch=size,
            free=-negative_free if by_memory else None,
            saturating=_saturating(features),
            samples=None if self._samples is None else min(self._samples, size),
            checkpoint_every=self._checkpoint_every,
        )
        logger.info(
            "%s, %s are free (--micro_batch_size and --recompute override it; the losses are the same)",
            choice.describe(size, lengths),
            format_bytes(-negative_free, 1),
        )
        return choice

    def _reduce(self, failed: MicroBatch, with_gradient: bool) -> None:
        """Continue with smaller micro-batches after one of them did not fit in memory."""
        current = self.micro_batching if with_gradient else None
        reduced = None if current is None else current.after_out_of_memory(failed)
        # Ranks that share a partitioned LLM would wait forever for a rank with other micro-batches.
        if self._is_partitioned or (reduced is None and (with_gradient or failed.samples == 1)):
            raise UserError(
                f"out of memory with {failed}; try --micro_batch_size 1 --recompute 1, --bits 4, a smaller LLM, or "
                "larger devices"
            )
        if reduced is None:
            self._evaluated_samples = failed.samples // 2
            logger.warning("out of memory; evaluating %s at once", counted(self._evaluated_samples, "sample"))
        else:
            self.micro_batching = reduced
            smaller = reduced.next([failed.length] * failed.samples)
            logger.warning("out of memory with %s; continuing with %s", failed, smaller)
        if self.llm.device.type != "cpu":
            torch.get_device_module(self.llm.device).empty_cache()

    def _lower_scale(self, gradient: torch.Tensor) -> None:
        # The overflow reaches the trainer's own scaler, which skips the step; the next batch gets a smaller scale.
        self._scale = torch.where(torch.isfinite(gradient).all(), self._scale, self._scale / 2)


def _saturating(features: torch.Tensor) -> int:
    return saturating_samples(features.shape[1], features.shape[2], features.device.type)
