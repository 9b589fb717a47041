"""What `--plan` measures on a device that is at hand: activations of a layer, time of a sample, time of the tower."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import torch

from llava_twophase.memory import is_out_of_memory
from llava_twophase.train.arguments import Arguments
from llava_twophase.train.model.activation_memory import ActivationMemory, free_memory
from llava_twophase.train.plan.calibrate import Probe, least_seconds, sample_seconds
from llava_twophase.train.plan.memory import MemoryPlan, Workload
from llava_twophase.train.preflight import TrainingInputs

logger = logging.getLogger(__name__)

# The forward pass of a layer takes half of its time: the backward pass computes gradients of its inputs only.
_RECOMPUTED = 0.5


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        sample_seconds: Time of one sample on one device; None without a measurement.
        activations: Memory for activations; None without a measurement.
        note: What was measured, or why nothing was.
    """

    sample_seconds: float | None
    activations: ActivationMemory | None
    note: str

    def refine(self, workload: Workload) -> Workload:
        """Return a workload with the measured activations."""
        return workload if self.activations is None else replace(workload, activations=self.activations)


def measure(
    arguments: Arguments, inputs: TrainingInputs, workload: Workload, memory: MemoryPlan, length: int
) -> Measurement:
    """Measure on the device of this process.

    Args:
        arguments: The run's arguments.
        inputs: Its inputs.
        workload: What is trained.
        memory: The plan so far.
        length: Number of ids of a typical sample.
    """
    layers = workload.activations.layers
    device, size = arguments.training.device, arguments.dtype.itemsize
    if "LLM weights, gathered layers" in memory.parts:
        return Measurement(None, None, "with ZeRO-3 it depends on the network between the devices")
    two_layers = 2 * workload.weights.quantised // layers * size
    if 2 * two_layers + workload.activations.needed(1, length, 0) * 2 // layers > free_memory(device):
        return Measurement(None, None, f"two of {layers} layers do not fit in the free memory of {device}")
    probe = Probe(
        config=inputs.config.get_text_config(),
        dtype=arguments.dtype,
        attention=arguments.model.attn_implementation,
        device=device,
        shape=(inputs.spec.patches, inputs.spec.tower_width),
        image_position=inputs.template.image_position,
        length=length,
    )
    try:
        activations = probe.activations(probe.llm(2), workload.activations)
        seconds = sample_seconds(
            probe, inputs.projector, workload.weights.flops, memory=activations, most=memory.samples
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Measurement(None, None, f"two of {layers} layers do not fit in the free memory of {device}")
    every = memory.micro_batching.checkpoint_every
    seconds *= 1 + _RECOMPUTED / every if every else 1
    seconds += _tower_seconds(inputs, device, memory.samples)
    return Measurement(seconds, activations, _note(arguments, layers))


def _tower_seconds(inputs: TrainingInputs, device: torch.device, samples: int) -> float:
    encode = inputs.source.encode
    if encode is None:
        return 0.0
    crop = inputs.source.sample(inputs.records[0].image)["crops"]
    crops = torch.stack([crop] * samples).to(device)
    return least_seconds(partial(encode, crops), device) / samples


def _note(arguments: Arguments, layers: int) -> str:
    dtype = str(arguments.dtype).removeprefix("torch.")
    quantised = f"; --bits {arguments.training.bits} takes longer" if arguments.training.bits != 16 else ""
    tower = "" if arguments.data.feature_cache else ", and of the tower"
    return (
        f"measured: 1 and 2 of {layers} layers with random weights in {dtype}{tower}, on this device{quantised}; "
        "without evaluations, saving, and waiting for data"
    )
