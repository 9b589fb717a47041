"""Figures that are logged beside the loss: samples, tokens and FLOPs per second, memory, data wait, time left.

All of them come from shapes and clocks on the host; nothing here waits for the device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from llava_twophase.compat import parameter_shape
from llava_twophase.train.model.activation_memory import process_memory

RATES = (
    "samples_per_second",
    "tokens_per_second",
    "tflops_per_device",
    "data_wait_percent",
    "memory_gb",
    "eta_seconds",
)
"""Names of the figures that ``Meter.report`` returns."""


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of a step against a frozen LLM: the forward pass, and the backward pass to its inputs.

    Each matrix weight costs 2 operations per token forward and 2 backward; its own gradient, 2 more, is not computed.

    Attributes:
        body: Matrix weights of the decoder layers.
        head: Matrix weights of the output embedding.
        attention: Layers times query width; scores and mixing cost 12 per pair of positions,
            half of it with a causal mask.
    """

    body: int
    head: int
    attention: int

    @classmethod
    def of(cls, llm: Any) -> StepFlops:
        """Count an LLM's weights."""
        head = llm.get_output_embeddings().weight
        embedding = llm.get_input_embeddings().weight
        shapes = {id(parameter): parameter_shape(parameter) for parameter in llm.parameters()}
        head_weights = prod(shapes[id(head)])
        matrices = {key: prod(shape) for key, shape in shapes.items() if len(shape) == 2}
        for table in (head, embedding):
            matrices.pop(id(table), None)
        config = llm.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            sum(matrices.values()), head_weights, config.num_hidden_layers * config.num_attention_heads * head_dim
        )

    def count(self, samples: int, positions: int, kept: int) -> float:
        """Return the operations of a batch.

        Args:
            samples: B.
            positions: N, spliced positions of each sample.
            kept: Positions whose logits are computed.
        """
        weights = 4 * (self.body * positions + self.head * kept)
        return samples * (weights + 6 * self.attention * positions * positions)


@dataclass
class Meter:
    """Sums since the last log."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def report(self, world_size: int, device: torch.device, steps_left: int) -> dict[str, float]:
        """Return rates over all ranks since this meter was created.

        Args:
            world_size: Ranks, each as fast as this one.
            device: The device of this rank.
            steps_left: Optimizer steps until the end of the run.

        Returns:
            ``samples_per_second``, ``tokens_per_second`` (spliced positions), ``tflops_per_device``,
            ``data_wait_percent``, ``memory_gb``: this rank's peak of device memory, or of the process on a CPU, and
            ``eta_seconds``: time left at this rate, without evaluation and saving.
        """
        seconds = max(time.perf_counter() - self.since, 1e-9)
        return {
            "samples_per_second": round(world_size * self.samples / seconds, 3),
            "tokens_per_second": round(world_size * self.tokens / seconds, 1),
            "tflops_per_device": round(self.flops / seconds / 1e12, 4),
            "data_wait_percent": round(100 * self.waited / seconds, 2),
            "memory_gb": round(_peak_memory(device) / 1e9, 3),
            "eta_seconds": round(seconds / max(self.steps, 1) * steps_left, 1),
        }


class GradientProbe:
    """Records the projector's gradients of one backward pass, before they are accumulated and reduced.

    Args:
        module: The projector.
    """

    def __init__(self, module: nn.Module) -> None:
        self.largest: dict[str, float] = {}
        self._handles = [
            parameter.register_hook(lambda gradient, name=name: self._see(name, gradient))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        self.expected = len(self._handles)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _see(self, name: str, gradient: torch.Tensor) -> None:
        largest = gradient.detach().abs().max().item()
        self.largest[name] = largest if largest == largest else float("nan")


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_memory(peak=True)
