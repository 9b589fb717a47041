"""How the batch of an optimizer step is spread over processes, and which engine holds the optimizer's state.

A run may resume with another layout if the global batch is the same. Its first layout still decides which samples are
in a step, and how the loss weights them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_twophase.compat import zero_stage


@dataclass(frozen=True)
class Layout:
    """Processes, their batches, and the engine.

    Attributes:
        world_size: Processes.
        batch_size: Samples in the batch of one process.
        accumulation: Batches of one process in an optimizer step.
        zero_stage: ZeRO stage; None without DeepSpeed.
    """

    world_size: int
    batch_size: int
    accumulation: int
    zero_stage: int | None = None

    @classmethod
    def of(cls, training: Any) -> Layout:
        """Return the layout of ``TrainingArguments``."""
        return cls(
            training.world_size,
            training.per_device_train_batch_size,
            training.gradient_accumulation_steps,
            zero_stage(training),
        )

    @property
    def global_batch(self) -> int:
        """Samples in an optimizer step."""
        return self.world_size * self.batch_size * self.accumulation

    def splits_batches_like(self, other: Layout) -> bool:
        """Return whether every process gets the same batches; the engine may differ."""
        return (self.world_size, self.batch_size, self.accumulation) == (
            other.world_size,
            other.batch_size,
            other.accumulation,
        )

    def shards_optimizer_like(self, other: Layout) -> bool:
        """Return whether the optimizer's state is in the same files; without DeepSpeed it is in one file."""
        if self.zero_stage is None or other.zero_stage is None:
            return self.zero_stage == other.zero_stage
        return (self.world_size, self.zero_stage) == (other.world_size, other.zero_stage)

    def samples_per_epoch(self, size: int, drop_last: bool) -> int:
        """Return the number of samples that an epoch trains on.

        One process trains on the rest as a smaller batch. Several processes fill up their last batches with the first
        samples of the epoch, as accelerate does.

        Args:
            size: Samples of the data set.
            drop_last: Drop the rest.
        """
        unit = self.world_size * self.batch_size
        if drop_last:
            return size // unit * unit
        return size if self.world_size == 1 else -(-size // unit) * unit

    def __str__(self) -> str:
        """Return a description for messages."""
        engine = "without DeepSpeed" if self.zero_stage is None else f"with ZeRO-{self.zero_stage}"
        parts = [
            _count(self.world_size, "process", "processes"),
            _count(self.batch_size, "sample", "samples"),
            _count(self.accumulation, "accumulation step", "accumulation steps"),
        ]
        return f"{' x '.join(parts)} {engine}"


def describe_change(written: Layout, layout: Layout) -> str:
    """Return what a run with another layout than its checkpoint's takes over."""
    return (
        f"it was written by {written}, this run has {layout}: the samples of each step and their weights in the loss, "
        "float32 weights, the optimizer's state, learning rates and the log are carried over; random states and "
        "micro-batches are not"
    )


def flags_for_global_batch(wanted: int, layout: Layout) -> str:
    """Return what to type for a global batch.

    Args:
        wanted: Its samples.
        layout: The present layout, whose batch size is kept if possible.
    """
    per_process, rest = divmod(wanted, layout.world_size)
    if rest:
        fitting = [str(number) for number in range(1, wanted + 1) if wanted % number == 0]
        return f"a number of processes that divides {wanted}: {', '.join(fitting)}"
    batch = max(size for size in range(1, min(layout.batch_size, per_process) + 1) if per_process % size == 0)
    accumulation = f"--gradient_accumulation_steps {per_process // batch}"
    if batch == layout.batch_size:
        return f"set {accumulation}"
    return f"set --per_device_train_batch_size {batch} {accumulation}"


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
