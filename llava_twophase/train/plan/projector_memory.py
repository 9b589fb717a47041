"""Bytes of a projector's training states, and of its batches, from the projector itself.

Shapes: L tokens of an image, D tower width, L' tokens after the projector, H LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llava_twophase.train.arguments import Arguments
from llava_twophase.train.model.activation_memory import saved_bytes

_PROBE = 128  # optimizers of 8 bits keep small parameters in float32


@dataclass(frozen=True)
class ProjectorMemory:
    """Memory of a projector in training.

    Attributes:
        weights: Number of weights.
        tokens: L', positions of an image in the LLM.
        width: H.
        kept: Bytes that autograd keeps for one sample.
        constant: Bytes that it keeps for a batch of any size: weights in the compute dtype.
    """

    weights: int
    tokens: int
    width: int
    kept: int
    constant: int

    @classmethod
    def measure(cls, projector: nn.Module, shape: tuple[int, int], dtype: torch.dtype) -> ProjectorMemory:
        """Run the projector on the CPU with two batch sizes.

        Args:
            projector: In float32, on the CPU.
            shape: L and D.
            dtype: The run's dtype, in which autocast runs the projector.
        """
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            one = saved_bytes(lambda: projector(torch.zeros(1, *shape)), projector)
            two = saved_bytes(lambda: projector(torch.zeros(2, *shape)), projector)
            with torch.no_grad():
                projected = projector(torch.zeros(1, *shape))
        kept = two - one
        weights = sum(parameter.numel() for parameter in projector.parameters())
        return cls(weights, projected.shape[1], projected.shape[2], kept, max(0, one - kept))

    def projected_bytes(self, samples: int, element_size: int) -> int:
        """Return the bytes of the projected features of some samples."""
        return samples * self.tokens * self.width * element_size


@dataclass(frozen=True)
class StateBytes:
    """Bytes for each trainable weight on one device.

    Attributes:
        weight: The weight as the forward pass reads it.
        gradient: Its gradient, with the buckets in which ranks exchange it.
        optimizer: The optimizer's state, with a float32 copy of the weight if there is one.
    """

    weight: float
    gradient: float
    optimizer: float

    @property
    def total(self) -> float:
        """All bytes."""
        return self.weight + self.gradient + self.optimizer


def state_bytes(element_size: int, optimizer: float, ranks: int, zero_stage: int | None) -> StateBytes:
    """Return the bytes that one trainable weight needs on one device.

    Args:
        element_size: Bytes of the run's dtype.
        optimizer: Bytes of the optimizer's own state for each weight.
        ranks: Devices of the run.
        zero_stage: DeepSpeed's ZeRO stage; None without DeepSpeed.
    """
    if zero_stage is None:
        return StateBytes(4, 4 if ranks == 1 else 8, optimizer)
    # Weights and gradients in the run's dtype; gradients are accumulated in float32 and, like the master weights and
    # the optimizer's state, partitioned over the ranks.
    shared = ranks if zero_stage >= 1 else 1
    weight = element_size / (shared if zero_stage == 3 else 1)
    return StateBytes(weight, element_size + 4 / (shared if zero_stage >= 2 else 1), (4 + optimizer) / shared)


def optimizer_bytes(arguments: Arguments) -> float:
    """Return the bytes of the optimizer's state for each weight, from one step on a small matrix.

    Args:
        arguments: The run's arguments.
    """
    from transformers import Trainer

    parameter = nn.Parameter(torch.zeros(_PROBE, _PROBE))
    build, options = Trainer.get_optimizer_cls_and_kwargs(arguments.training)
    optimizer = build([parameter], **options)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter].values()
    used = sum(value.nbytes for value in state if isinstance(value, torch.Tensor) and value.numel() > 1)
    return float(used / parameter.numel())
