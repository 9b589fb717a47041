"""Bytes of a frozen LLM's weights on each device, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from llava_twophase.train.loop.metrics import StepFlops

# bitsandbytes in 4 bits: weights that share a scale, and scales that share a scale with double quantisation.
_BLOCK, _BLOCK_OF_SCALES = 64, 256


@dataclass(frozen=True)
class Placement:
    """How the LLM's weights are stored.

    Attributes:
        element_size: Bytes of a weight in the run's dtype.
        bits: 16 for the run's dtype; 8 or 4 for bitsandbytes.
        double_quant: With 4 bits, whether the scales are quantised too.
        shares: Ranks over which ZeRO-3 partitions the weights; 0 without it.
        offloaded: With ZeRO-3, whether the weights are in host memory.
        most_gathered: With ZeRO-3, weights that may be complete on a device at the same time.
    """

    element_size: int
    bits: int = 16
    double_quant: bool = True
    shares: int = 0
    offloaded: bool = False
    most_gathered: int = 10**9


@dataclass(frozen=True)
class LLMWeights:
    """Numbers of weights of an LLM.

    Attributes:
        quantised: Weights of the matrices that bitsandbytes quantises.
        others: All other weights: embeddings, norms, biases, the output embedding.
        largest: Weights of the largest matrix that bitsandbytes quantises.
        flops: Operations of a step.
    """

    quantised: int
    others: int
    largest: int
    flops: StepFlops

    @classmethod
    def of(cls, config: Any) -> LLMWeights:
        """Count the weights of an LLM, built without memory.

        Args:
            config: The configuration of a causal LM.
        """
        build: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        # The class itself: from_config would partition the model if ZeRO-3 is enabled.
        with torch.device("meta"):
            llm = build(config)
        head = llm.get_output_embeddings().weight
        matrices = {
            id(module.weight): module.weight.numel()
            for module in llm.modules()
            if isinstance(module, nn.Linear) and module.weight is not head
        }
        total = sum(parameter.numel() for parameter in llm.parameters())
        quantised = sum(matrices.values())
        return cls(quantised, total - quantised, max(matrices.values(), default=0), StepFlops.of(llm))

    def on_device(self, placement: Placement) -> dict[str, int]:
        """Return the bytes on each device, by part."""
        total = (self.quantised + self.others) * placement.element_size
        if placement.shares:
            share = 0 if placement.offloaded else -(-total // placement.shares)
            gathered = min(total, placement.most_gathered * placement.element_size)
            return {"LLM weights, this device's share": share, "LLM weights, gathered layers": gathered}
        if placement.bits == 16:
            return {"LLM weights": total}
        return {
            "LLM weights": self.others * placement.element_size + self._quantised_bytes(placement),
            "LLM weights, one matrix at full precision": self.largest * placement.element_size,
        }

    def _quantised_bytes(self, placement: Placement) -> int:
        if placement.bits == 8:
            return self.quantised  # the scales are one number for each row
        blocks = -(-self.quantised // _BLOCK)
        scales = blocks + 4 * (-(-blocks // _BLOCK_OF_SCALES)) if placement.double_quant else 4 * blocks
        return self.quantised // 2 + scales
