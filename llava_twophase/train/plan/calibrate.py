"""Measure the time of a training step on this device, with a few layers of the LLM's shape and random weights.

Time grows by the same amount with each decoder layer, so one layer and two give the time of all of them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llava_twophase.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_twophase.train.loop.metrics import StepFlops
from llava_twophase.train.model.activation_memory import ActivationMemory, measure_activations
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.llava import LlavaProjectorModel
from llava_twophase.train.model.load_llm import LoadedLLM
from llava_twophase.train.model.micro_batches import MicroBatching

_MEASURED_SECONDS = 3.0
# Operations of one layer in one measurement on a CPU: two seconds on two cores.
_CPU_OPERATIONS = 2e11
# The output embedding of a large vocabulary is computed from operations: it is large, and read at captions only.
_VOCABULARY = 1024


@dataclass(frozen=True)
class Probe:
    """What is measured.

    Attributes:
        config: The LLM's configuration.
        dtype: The run's dtype.
        attention: ``--attn_implementation``.
        device: Where to measure.
        shape: L and D, the features of one image.
        image_position: Index of the image token.
        length: Number of ids of a typical sample.
    """

    config: Any
    dtype: torch.dtype
    attention: str | None
    device: torch.device
    shape: tuple[int, int]
    image_position: int
    length: int

    def llm(self, layers: int) -> Any:
        """Build an LLM with so many layers and random weights."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        config.vocab_size, config.pad_token_id = min(config.vocab_size, _VOCABULARY), None
        build: Any = AutoModelForCausalLM.from_config
        with self.device:
            return build(config, dtype=self.dtype, attn_implementation=self.attention).requires_grad_(False)

    def activations(self, llm: Any, estimate: ActivationMemory) -> ActivationMemory:
        """Measure what autograd keeps of a layer, as the trainer does before its first step.

        Args:
            llm: As ``llm`` builds it.
            estimate: The analytic estimate for the complete LLM.
        """
        positions = self.length - 1 + estimate.image_tokens
        size = (1, positions, llm.config.get_text_config().hidden_size)
        embeds = torch.randn(size, dtype=self.dtype, device=self.device)
        layers = llm.config.get_text_config().num_hidden_layers
        found = measure_activations(llm.eval(), embeds, replace(estimate, layers=layers))
        return replace(found, layers=estimate.layers)

    def seconds(self, llm: Any, projector: nn.Module, samples: int, memory: ActivationMemory) -> float:
        """Return the least time of a forward and a backward pass of some samples, without recomputation.

        Args:
            llm: As ``llm`` builds it.
            projector: On the device.
            samples: They are one micro-batch.
            memory: Memory for activations.
        """
        frozen = FrozenLLM(LoadedLLM(llm), self.image_position)
        frozen.resume_with(MicroBatching(samples, 0, memory.needed(samples, self.length, 0), memory))
        model = LlavaProjectorModel(frozen, projector, memory.image_tokens)
        batch = self._batch(samples, llm.config.get_text_config().vocab_size)

        def step() -> None:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = model(**batch)["loss"]
            loss.backward()

        return least_seconds(step, self.device)

    def _batch(self, samples: int, vocabulary: int) -> dict[str, Any]:
        ids = torch.randint(vocabulary, (samples, self.length), device=self.device)
        ids[:, self.image_position] = IMAGE_TOKEN_INDEX
        labels = ids.clone()
        labels[:, : self.image_position + 1] = IGNORE_INDEX
        features = torch.randn(samples, *self.shape, device=self.device)
        return {"input_ids": ids, "labels": labels, "features": features, "lengths": [self.length] * samples}


def measurable_samples(flops: StepFlops, layers: int, positions: int, most: int, device: torch.device) -> int:
    """Return how many samples are measured together: on a CPU, as many as take about two seconds for each layer.

    Args:
        flops: Operations of the complete LLM.
        layers: Its number of layers.
        positions: N, spliced positions of a sample.
        most: Samples of a micro-batch.
        device: Where to measure.
    """
    if device.type != "cpu":
        return most
    return max(1, min(most, int(_CPU_OPERATIONS * layers / flops.count(1, positions, 0))))


def sample_seconds(probe: Probe, projector: nn.Module, flops: StepFlops, memory: ActivationMemory, most: int) -> float:
    """Measure the time of the projector and the complete LLM for one sample, without recomputation.

    Args:
        probe: What is measured.
        projector: The projector; a copy of it is moved to the device.
        flops: Operations of the complete LLM.
        memory: Memory for its activations.
        most: Samples of a micro-batch.
    """
    projector = copy.deepcopy(projector).to(probe.device)
    positions = probe.length - 1 + memory.image_tokens
    samples = measurable_samples(flops, memory.layers, positions, most, probe.device)
    one, two = (probe.seconds(probe.llm(layers), projector, samples, memory) for layers in (1, 2))
    layer = max(two - one, 0.0) / samples
    # The output embedding at the rate of a layer, for the part of the vocabulary that was skipped.
    vocabulary = int(probe.config.vocab_size)
    skipped = max(0, vocabulary - _VOCABULARY) / vocabulary
    complete = flops.count(1, positions, 0)
    head = skipped * (flops.count(1, positions, probe.length) - complete) * layer * memory.layers / complete
    return one / samples + (memory.layers - 1) * layer + head


def least_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the least time of one call; at least two calls, since the first one includes set-up.

    Args:
        step: Does the work.
        device: Where it is done.
    """
    best, begun = float("inf"), time.perf_counter()
    for attempt in count():
        started = time.perf_counter()
        step()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        now = time.perf_counter()
        best = min(best, now - started)
        if attempt and now - begun > _MEASURED_SECONDS:
            return best
    raise AssertionError("unreachable")
