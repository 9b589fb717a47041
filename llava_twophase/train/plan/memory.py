"""Memory of each device in a training run, by part, and the micro-batches that the trainer would choose.

The trainer's own function chooses the micro-batches, from the memory that is expected to be free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from llava_twophase.train.model.activation_memory import ActivationMemory
from llava_twophase.train.model.micro_batches import (
    MicroBatching,
    choose_micro_batching,
    free_for_activations,
    saturating_samples,
)
from llava_twophase.train.plan.llm_weights import LLMWeights, Placement
from llava_twophase.train.plan.projector_memory import ProjectorMemory, state_bytes

# A GPU's memory that no tensor can have: driver, CUDA context, kernels of libraries.
_RESERVED_ON_GPU = 1_500_000_000
_RANKS = (2, 4, 8)


@dataclass(frozen=True)
class Device:
    """A device to plan for.

    Attributes:
        type: As in ``torch.device.type``.
        free: Bytes that are free before anything is loaded.
    """

    type: str
    free: int

    @classmethod
    def absent(cls, gigabytes: float) -> Device:
        """Return a GPU that is not at hand.

        Args:
            gigabytes: Its memory as it is sold: 24, 40, 80.
        """
        return cls("cuda", int(gigabytes * 2**30) - _RESERVED_ON_GPU)


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        weights: The LLM's weights.
        activations: Memory for its activations.
        projector: The projector's memory.
        feature_bytes: Features of one sample as a batch holds them.
        tower_bytes: Weights of the vision tower, 0 with a feature cache.
        lengths: Numbers of ids of the longest sample of the first batch, and of the data set.
    """

    weights: LLMWeights
    activations: ActivationMemory
    projector: ProjectorMemory
    feature_bytes: int
    tower_bytes: int
    lengths: tuple[int, int]


@dataclass(frozen=True)
class Setup:
    """How it is trained.

    Attributes:
        placement: How the LLM's weights are stored.
        ranks: Devices of the run.
        batch: Samples of a batch of one device.
        accumulation: Batches of one optimizer step.
        zero_stage: DeepSpeed's ZeRO stage; None without DeepSpeed.
        optimizer: Bytes of the optimizer's state for each weight.
        samples: ``--micro_batch_size``; None for auto.
        checkpoint_every: ``--recompute``; None for auto.
    """

    placement: Placement
    ranks: int = 1
    batch: int = 32
    accumulation: int = 1
    zero_stage: int | None = None
    optimizer: float = 8.0
    samples: int | None = None
    checkpoint_every: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device.

    Attributes:
        parts: Bytes by part; they are in use at the same time.
        micro_batching: The trainer's choice.
        batch: Samples of a batch.
        first: Number of ids of the longest sample of the first batch.
        free: Bytes that are free before anything is loaded.
    """

    parts: dict[str, int]
    micro_batching: MicroBatching
    batch: int
    first: int
    free: int

    @property
    def peak(self) -> int:
        """All bytes at the same time."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.peak <= self.free

    @property
    def samples(self) -> int:
        """Samples of a micro-batch."""
        return min(self.micro_batching.samples, self.batch)

    @property
    def typical(self) -> tuple[int, int]:
        """Bytes of a micro-batch of the first batch, and those of its logits and their gradients alone."""
        memory, every = self.micro_batching.memory, self.micro_batching.checkpoint_every
        return memory.needed(self.samples, self.first, every), self.samples * self.first * memory.head


def plan_memory(workload: Workload, setup: Setup, device: Device) -> MemoryPlan:
    """Return the memory that a run needs on a device, and the micro-batches that fit in it."""
    projector = workload.projector
    states = state_bytes(setup.placement.element_size, setup.optimizer, setup.ranks, setup.zero_stage)
    llm = workload.weights.on_device(setup.placement)
    # Ready batches: those of one step, one that is being read, and on the host one more in the ring of buffers.
    ready = setup.accumulation + (2 if device.type == "cpu" else 1)
    projected = projector.projected_bytes(setup.batch, setup.placement.element_size)
    batch = setup.batch * (ready * workload.feature_bytes + projector.kept) + projector.constant + projected
    # The trainer chooses when LLM, projector and first batch are loaded: no gradient and no optimizer state exists.
    loaded = sum(llm.values()) + workload.tower_bytes + int(projector.weights * states.weight) + batch
    chosen_by_memory = setup.samples is None or setup.checkpoint_every is None
    micro_batching = choose_micro_batching(
        memory=workload.activations,
        lengths=workload.lengths,
        batch=setup.batch,
        free=free_for_activations(device.free - loaded, projected) if chosen_by_memory else None,
        saturating=saturating_samples(projector.tokens, projector.width, device.type),
        samples=None if setup.samples is None else min(setup.samples, setup.batch),
        checkpoint_every=setup.checkpoint_every,
    )
    used = replace(micro_batching, samples=min(micro_batching.samples, setup.batch))
    parts = {
        **llm,
        "vision tower": workload.tower_bytes,
        "projector, gradients and optimizer": int(projector.weights * states.total),
        "batch: features, projected features": batch + projected,
        "micro-batch: activations and logits": used.peak(workload.lengths[1]),
    }
    return MemoryPlan(
        parts={part: size for part, size in parts.items() if size},
        micro_batching=micro_batching,
        batch=setup.batch,
        first=workload.lengths[0],
        free=device.free,
    )


def alternatives(workload: Workload, setup: Setup, device: Device) -> Iterator[tuple[str, MemoryPlan]]:
    """Yield what to type instead and its plan, for each change of the command that fits in the device's memory."""
    changes = _changes(setup) if device.type == "cpu" else chain(_changes(setup), _changes_on_accelerators(setup))
    for advice, changed in changes:
        plan = plan_memory(workload, changed, device)
        if plan.fits:
            yield advice, plan


def _changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    automatic = replace(setup, samples=None, checkpoint_every=None)
    if automatic != setup:
        yield "--micro_batch_size auto --recompute auto", automatic
    batch, factor = setup.batch, 1
    while batch % 2 == 0:
        batch, factor = batch // 2, factor * 2
        accumulation = setup.accumulation * factor
        yield (
            f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulation}",
            replace(automatic, batch=batch, accumulation=accumulation),
        )
    if setup.placement.element_size == 4:
        # The activations are smaller too; counting them in float32 errs on the safe side.
        yield "--bf16 True", replace(automatic, placement=replace(setup.placement, element_size=2))


def _changes_on_accelerators(setup: Setup) -> Iterator[tuple[str, Setup]]:
    # bitsandbytes needs CUDA, and ranks on CPUs of one machine share its memory.
    automatic = replace(setup, samples=None, checkpoint_every=None)
    if setup.zero_stage != 3:
        for bits in (8, 4):
            if bits < setup.placement.bits:
                yield f"--bits {bits}", replace(automatic, placement=replace(setup.placement, bits=bits))
    for ranks in (count for count in sorted({setup.ranks, *_RANKS}) if count >= max(2, setup.ranks)):
        placement = replace(setup.placement, bits=16, shares=ranks)
        text = f"--deepspeed pipelines/zero3.json on {ranks} devices"
        yield text, replace(automatic, placement=placement, ranks=ranks, zero_stage=3)
    offloaded = replace(setup.placement, bits=16, shares=setup.ranks, offloaded=True)
    text = "--deepspeed pipelines/zero3_offload.json, with the LLM in host memory"
    yield text, replace(automatic, placement=offloaded, zero_stage=3)
