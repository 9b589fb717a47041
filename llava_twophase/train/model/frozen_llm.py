"""The frozen LLM as one function, projected features -> loss; knows nothing of projectors, optimizers or files.

Nothing in the LLM is trained, so to autograd it can be a single node: its forward pass takes the batch through the LLM
in micro-batches and differentiates each at once, its backward pass hands on the gradient found then. Activations exist
for one micro-batch only, and whatever trains the projector (DDP, ZeRO, accumulation) sees an ordinary small model.

Shapes: B samples, b of a micro-batch, T ids, L patch tokens, H width, V vocabulary; N = T - 1 + L spliced positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from llava_twophase.constants import IGNORE_INDEX
from llava_twophase.errors import UserError
from llava_twophase.train.model.micro_batches import (
    Cut,
    agreed,
    choose_cut,
    enough_rows,
    free_bytes,
    paper_row,
    saved_bytes,
)

logger = logging.getLogger(__name__)


class FrozenLLM:
    """A causal LM whose weights stay as they are.

    Args:
        llm: The LM, already on its device; its parameters stop requiring gradients.
        image_at: Position of the image token in ``input_ids``: 1 behind a BOS, else 0.
        micro_batch_size: Samples that go through the LLM at once; None chooses by memory.
        recompute: 0 for nothing, k for every k-th layer; None chooses by memory.

    Attributes:
        cut: The choice, made at the first batch; whoever resumes a run may set it to what that run had, because
            another cut rounds otherwise.
    """

    def __init__(
        self, llm: Any, image_at: int = 1, micro_batch_size: int | None = None, recompute: int | None = None
    ) -> None:
        self.llm = llm.requires_grad_(False)
        self.image_at = image_at
        self._wanted = micro_batch_size, recompute
        self._cut: Cut | None = None
        self._last_layer = _LastLayer(llm)
        # float16 gradients of a mean over a whole batch would vanish; a tensor, so that nothing waits for the device.
        self._scale = torch.tensor(2.0**16 if llm.dtype == torch.float16 else 1.0, device=llm.device)

    @property
    def cut(self) -> Cut | None:
        """How batches are cut; None before the first one."""
        return self._cut

    @cut.setter
    def cut(self, cut: Cut) -> None:
        self._cut = cut
        if cut.recompute:
            self.llm.activation_checkpointing_enable(every_n_layers=cut.recompute)
            self.llm.disable_input_require_grads()  # that serves finetuning; here image positions alone need any
        elif self.llm.is_activation_checkpointing:
            self.llm.activation_checkpointing_disable()

    def compile(self, **options: Any) -> None:
        """Compile the decoder layers, which share one compilation; options are ``torch.compile``'s.

        The last one stays as it is: it shares the others' code, but not what is left out of it.
        """
        for layer in _layers(self.llm)[:-1]:
            layer.compile(**options)

    def loss(
        self,
        projected: torch.Tensor,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the mean loss over a batch's caption tokens, however the batch is cut.

        Args:
            projected: ``[B, L, H]``, any float dtype.
            input_ids: int64 ``[B, T]``, right-padded.
            labels: int64 ``[B, T]``, -100 where nothing is learnt.
            lengths: Ids of each sample, on the host; with them micro-batches drop padding that is not theirs.

        Returns:
            float32 scalar, differentiable with regard to `projected`; 0 where there is no caption token at all.

        Raises:
            UserError: One sample does not fit in memory with every layer recomputed.
        """
        learning = torch.is_grad_enabled() and projected.requires_grad

        def run(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            # Its weights have their own dtype already, so autocast could only cast what it need not.
            with torch.autocast(features.device.type, enabled=False):
                return self._batch(features, (input_ids, labels), lengths, learning)

        if not learning:
            return run(projected)[0]
        return _Loss.apply(projected, run, self._scale)

    def _batch(
        self,
        projected: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor],
        lengths: Sequence[int] | None,
        learning: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_ids, labels = text
        features = projected.detach().to(self.llm.dtype)
        batch, longest = input_ids.shape
        if learning and self._cut is None:
            self.cut = self._choose(features, input_ids, labels)
        rows = self._cut.rows if self._cut else enough_rows(features)
        # Longest first, so that a micro-batch holds little padding, and what does not fit shows at once.
        lengths = [longest] * batch if lengths is None else lengths
        order = sorted(range(batch), key=lambda index: -lengths[index])
        # Divided before the sum, as a mean is: a sum of float16 gradients times the scale could overflow. A batch of
        # captions without a token, as of dropped <unk>s alone, has a loss of 0, not of 0 / 0.
        weight = self._scale / (labels[:, self.image_at + 1 :] != IGNORE_INDEX).sum().clamp(min=1)
        total = torch.zeros((), device=features.device)
        gradient = torch.empty_like(features) if learning else None
        while order:
            length = lengths[order[0]]
            rows = min(rows, len(order))
            index = torch.tensor(order[:rows]).to(features.device, non_blocking=True)
            inputs = features[index], input_ids[index, :length], labels[index, :length]
            try:
                with self._last_layer.reading_from(self._first_read(features)):
                    loss, part = self._piece(inputs, weight, learning)
            except torch.OutOfMemoryError:
                loss = None  # handled outside, where the traceback no longer holds the activations
            if loss is None:
                rows = self._cut_smaller(rows)
                continue
            total += loss
            if gradient is not None:
                gradient.index_copy_(0, index, part)
            order = order[rows:]
        if gradient is not None and self.llm.dtype == torch.float16:
            self._lower_scale(gradient)
        return total, gradient

    def _piece(
        self, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], weight: torch.Tensor, learning: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a micro-batch through the LLM: its share of the loss, and the gradient, empty if not learning."""
        features, input_ids, labels = inputs
        if not learning:
            return self._sum(features, input_ids, labels) * (weight / self._scale), features.new_empty(0)
        with torch.enable_grad():
            leaf = features.detach().requires_grad_()
            loss = self._sum(leaf, input_ids, labels) * weight
            (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach() / self._scale, gradient

    def _sum(self, features: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        embeds = self.splice(features, input_ids)  # [b, N, H]
        # By index, not as a slice: a slice of the hidden states is not contiguous, and a frozen output embedding
        # would be multiplied, even copied, once for each sample.
        read = torch.arange(self._first_read(features), embeds.shape[1] - 1, device=embeds.device)
        logits = self.llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=read).logits  # [b, T - image_at - 1, V]
        targets = labels[:, self.image_at + 1 :]  # [b, T - image_at - 1]
        return cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    def _first_read(self, features: torch.Tensor) -> int:
        # The last image position predicts the caption's first token; nobody reads what comes before it.
        return self.image_at + features.shape[1] - 1

    def splice(self, features: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Replace the image token of ``[b, T]`` ids by ``[b, L, H]`` features: ``[b, N, H]``."""
        text = self.llm.get_input_embeddings()(input_ids.clamp(min=0))  # [b, T, H]
        return torch.cat([text[:, : self.image_at], features, text[:, self.image_at + 1 :]], dim=1)

    def _choose(self, features: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> Cut:
        """Choose the cut by what one sample's forward pass keeps, the same on all ranks, and say so."""
        rows, recompute = self._wanted
        batch = len(features)
        if rows is not None and recompute is not None:
            return Cut(min(rows, batch), recompute)
        positions = input_ids.shape[1] + features.shape[1]
        row = paper_row(self.llm.config.get_text_config(), positions, input_ids.shape[1], features.element_size())
        # A trial knows the attention kernel, Liger's and the compiler's savings; a partitioned LLM (ZeRO-3) counts
        # the passes through each layer, and would miss the trial's backward one.
        if not hasattr(self.llm, "zero3_engine"):
            row = replace(row, layer=self._trial(features, input_ids, labels) // row.layers)
        free = free_bytes(features.device) - 4 * features.nbytes  # the projector's own gradients, still to come
        enough = enough_rows(features)
        cut = agreed(choose_cut(row, free, batch, enough, rows, recompute), features.device)
        logger.info(
            "a batch of %d goes through the LLM in %s: about %.1f GB, %.1f GB are free "
            "(--micro_batch_size and --recompute override it; the losses are the same)",
            batch,
            cut,
            row.needed(cut) / 1e9,
            free / 1e9,
        )
        return cut

    def _trial(self, features: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> int:
        with torch.enable_grad(), self._last_layer.reading_from(self._first_read(features)):
            leaf = features[:1].detach().requires_grad_()
            return saved_bytes(lambda: self._sum(leaf, input_ids[:1], labels[:1]), self.llm)

    def _cut_smaller(self, rows: int) -> int:
        cut = (self._cut or Cut(rows)).smaller()
        if cut is None or hasattr(self.llm, "zero3_engine"):
            # Ranks that share a partitioned LLM would wait for each other for ever if one of them cut otherwise.
            raise UserError(
                f"out of memory with {self._cut or Cut(rows)}; try --micro_batch_size 1 --recompute 1, --bits 4, "
                "a smaller LLM, or larger devices"
            )
        logger.warning("out of memory; from here on: %s", cut)
        self.cut = cut
        if self.llm.device.type != "cpu":
            torch.get_device_module(self.llm.device).empty_cache()
        return cut.rows

    def _lower_scale(self, gradient: torch.Tensor) -> None:
        # What overflowed goes on to the trainer's own scaler, which skips the step; the next batch gets a smaller one.
        self._scale = torch.where(torch.isfinite(gradient).all(), self._scale, self._scale / 2)


class _Loss(torch.autograd.Function):
    """Loss and gradient in one go; the backward pass only multiplies."""

    @staticmethod
    def forward(ctx: Any, projected: torch.Tensor, run: Callable[..., Any], scale: torch.Tensor) -> torch.Tensor:
        loss, gradient = run(projected)
        ctx.save_for_backward(gradient, scale)
        ctx.dtype = projected.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient, scale = ctx.saved_tensors
        return gradient.to(ctx.dtype) * (grad_output / scale), None, None


class _LastLayer:
    """Leaves out, in the last decoder layer, what would be computed at positions that nobody reads.

    Its keys and values are needed everywhere; queries, the attention's output projection and the MLP work position by
    position, so their inputs lose the positions in front and their outputs get zeros there. What a layer does not have
    under these names is computed in full.

    Args:
        llm: The LM; it is as it was outside of ``reading_from``.
    """

    def __init__(self, llm: Any) -> None:
        layer = _layers(llm)[-1] if _layers(llm) else None
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        parts = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None)]
        # A mixture of experts has no down_proj of its own, and may look at all positions together.
        parts.append(mlp if isinstance(getattr(mlp, "down_proj", None), nn.Linear) else None)
        self._parts = [part for part in parts if part is not None]

    @contextmanager
    def reading_from(self, position: int) -> Iterator[None]:
        """Leave out the positions before this one, in forward passes and their recomputation."""

        def drop(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            # By index for the same reason as in `_sum`: a linear layer copies its weight for what is not contiguous.
            kept = torch.arange(position, inputs[0].shape[1], device=inputs[0].device)
            return inputs[0].index_select(1, kept), *inputs[1:]

        def restore(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            return pad(output, (0, 0, position, 0))

        handles = [part.register_forward_pre_hook(drop) for part in self._parts]
        handles += [part.register_forward_hook(restore) for part in self._parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _layers(llm: Any) -> Sequence[Any]:
    return getattr(llm.get_decoder(), "layers", ())  # GPT-2, Falcon and MPT call them otherwise
