"""Choose the size of micro-batches and activation checkpointing from activation size and free memory.

Losses do not depend on this choice beyond rounding; speed and memory do. A micro-batch is bounded by the memory that
its positions need, so one long caption makes one small micro-batch and leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from llava_twophase.text import format_bytes
from llava_twophase.train.model.activation_memory import ActivationMemory

# Values of a micro-batch's hidden states beyond which larger matrices are no faster. On an accelerator the last wave of
# tiles should be a small part of all: 1280 tiles of 128 x 128 are ten waves on 132 multiprocessors, 4096 positions of
# width 5120. A CPU core reaches its full rate much earlier (tests/benchmarks/train_step.py).
SATURATING_VALUES = {"cpu": 2**20}
SATURATING_VALUES_ON_ACCELERATORS = 20 * 2**20
# Part of the free memory that is left unused, for fragmentation.
MARGIN = 0.15
# Every k-th layer is recomputed, from none to all: each step needs less memory and more computation.
CHECKPOINT_STEPS = (0, 4, 2, 1)
# How much more memory a micro-batch may need than those of the first batch, whose captions may be short ones.
HEADROOM = 1.5


class MicroBatch(NamedTuple):
    """Size and activation checkpointing of one micro-batch.

    Attributes:
        samples: Number of samples.
        length: Number of ids of the longest one.
        checkpoint_every: Activation checkpointing, as in ``MicroBatching``.
    """

    samples: int
    length: int
    checkpoint_every: int

    def __str__(self) -> str:
        """Return a description for the log."""
        known = {0: "no activation checkpointing", 1: "activation checkpointing of every layer"}
        checkpointing = known.get(
            self.checkpoint_every, f"activation checkpointing of one layer in {self.checkpoint_every}"
        )
        return f"micro-batches of {self.samples} sample{'s' if self.samples > 1 else ''}, {checkpointing}"


@dataclass(frozen=True)
class MicroBatching:
    """How batches are split into micro-batches.

    Attributes:
        samples: Largest number of samples.
        checkpoint_every: Activation checkpointing: 0 keeps all activations, k recomputes those of every k-th layer. A
            sample that exceeds the limit on its own gets a smaller k.
        limit: Memory that a micro-batch may need, in bytes.
        memory: Memory for activations, from which the need follows.
    """

    samples: int
    checkpoint_every: int
    limit: int
    memory: ActivationMemory

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> MicroBatching:
        """Return what ``dataclasses.asdict`` turned into a dictionary."""
        return cls(**{**content, "memory": ActivationMemory(**content["memory"])})

    def next(self, lengths: Sequence[int]) -> MicroBatch:
        """Return the next micro-batch of a batch.

        Args:
            lengths: Numbers of ids of the samples that are left, longest first.
        """
        longest = lengths[0]
        for samples in range(min(self.samples, len(lengths)), 0, -1):
            if self.memory.needed(samples, longest, self.checkpoint_every) <= self.limit:
                return MicroBatch(samples, longest, self.checkpoint_every)
        steps = self._steps()
        fitting = (step for step in steps if self.memory.needed(1, longest, step) <= self.limit)
        return MicroBatch(1, longest, next(fitting, steps[-1]))

    def after_out_of_memory(self, failed: MicroBatch) -> MicroBatching | None:
        """Return a micro-batching with a lower limit; None if the failed micro-batch cannot be made smaller."""
        if failed.samples > 1:
            limit = self.memory.needed(failed.samples // 2, failed.length, failed.checkpoint_every)
        elif failed.checkpoint_every != self._steps()[-1]:
            limit = self.memory.needed(1, failed.length, failed.checkpoint_every) - 1
        else:
            return None
        return replace(self, limit=limit)

    def peak(self, longest: int) -> int:
        """Return the largest need of a micro-batch, in bytes, if the longest sample has so many ids."""
        micro_batches = (self.next([length] * self.samples) for length in range(1, longest + 1))
        return max(self.memory.needed(*micro_batch) for micro_batch in micro_batches)

    def describe(self, batch: int, lengths: tuple[int, int]) -> str:
        """Return one line for the log.

        Args:
            batch: Samples of a batch, which may be fewer than a micro-batch could hold.
            lengths: Numbers of ids of the longest sample of the first batch, and of the data set.
        """
        first, longest = lengths
        used = replace(self, samples=min(self.samples, batch))
        return (
            f"a batch of {batch} goes through the LLM in {used}: about "
            f"{format_bytes(self.memory.needed(used.samples, first, self.checkpoint_every), 1)}, at most "
            f"{format_bytes(used.peak(longest), 1)} for the longest sample "
            f"({longest - 1 + self.memory.image_tokens} positions)"
        )

    def _steps(self) -> list[int]:
        """Return this choice and those that recompute more layers."""
        current = self.checkpoint_every
        return [current, *(step for step in CHECKPOINT_STEPS[1:] if not current or step < current)]

    def __str__(self) -> str:
        """Return a description for the log."""
        return str(MicroBatch(self.samples, 0, self.checkpoint_every))


def choose_micro_batching(
    memory: ActivationMemory,
    lengths: tuple[int, int],
    batch: int,
    free: int | None,
    saturating: int,
    samples: int | None = None,
    checkpoint_every: int | None = None,
) -> MicroBatching:
    """Choose the fastest micro-batching that fits; small micro-batches cost less than recomputation.

    Sizes are powers of two, so a small difference in free memory seldom changes the choice.

    Args:
        memory: Memory for activations.
        lengths: Numbers of ids of the longest sample of the first batch, and of the data set.
        batch: Samples of the batch.
        free: Bytes that a micro-batch may take; None for any number.
        saturating: Samples beyond which larger micro-batches are no faster.
        samples: The user's own choice.
        checkpoint_every: The user's own choice.

    Returns:
        The choice; the smallest allowed one if nothing fits.
    """
    first, longest = lengths
    budget = int(free * (1 - MARGIN)) if free is not None else memory.needed(batch, longest, 0)
    largest = 1 << (min(batch, max(saturating, 1)) - 1).bit_length()
    sizes = [largest >> power for power in range(largest.bit_length())] if samples is None else [samples]
    steps = CHECKPOINT_STEPS if checkpoint_every is None else (checkpoint_every,)
    choices = [(size, step) for step in steps for size in sizes]
    fitting = (choice for choice in choices if memory.needed(choice[0], first, choice[1]) <= budget)
    size, step = next(fitting, choices[-1])
    typical = memory.needed(size, first, step)
    wanted = max(int(HEADROOM * typical), memory.needed(1, longest, step))
    return MicroBatching(size, step, max(typical, min(wanted, budget)), memory)


def free_for_activations(free: int, projected_bytes: int) -> int:
    """Return how much of the free memory a micro-batch may take.

    Args:
        free: Bytes that are free before the first step.
        projected_bytes: Bytes of the projected features of a batch in the LLM's dtype.
    """
    return free - 4 * projected_bytes  # for the gradients of the projector


def saturating_samples(tokens: int, width: int, device_type: str) -> int:
    """Return how many samples use the full rate of their device.

    Args:
        tokens: L, about the positions of a sample.
        width: H, the LLM's width.
        device_type: As in ``torch.device.type``.
    """
    values = SATURATING_VALUES.get(device_type, SATURATING_VALUES_ON_ACCELERATORS)
    return -(-values // (tokens * width))


def largest_of_all_ranks(values: Sequence[int], device: torch.device) -> list[int]:
    """Return the element-wise maximum over all ranks, so that all ranks decide alike."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return list(values)
    largest = torch.tensor(values, device=device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return [int(value) for value in largest.tolist()]
