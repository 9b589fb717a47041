"""A loss whose gradient is computed in the forward pass, as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Compute = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


def loss_with_gradient(inputs: torch.Tensor, compute: Compute, scale: torch.Tensor) -> torch.Tensor:
    """Return a loss that is differentiable with respect to its inputs.

    Args:
        inputs: What the loss is a function of.
        compute: Returns the loss of the inputs, and its gradient times `scale`; called once, in this call.
        scale: A scalar tensor; gradients of a low precision are kept in range by it.

    Returns:
        The loss. Its backward pass only multiplies.
    """
    loss: torch.Tensor = _LossWithGradient.apply(inputs, compute, scale)  # type: ignore[no-untyped-call]
    return loss


class _LossWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, compute: Compute, scale: torch.Tensor) -> torch.Tensor:
        loss, gradient = compute(inputs)
        ctx.save_for_backward(gradient, scale)
        ctx.dtype = inputs.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient, scale = ctx.saved_tensors
        return gradient.to(ctx.dtype) * (grad_output / scale), None, None
