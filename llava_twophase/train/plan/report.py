"""The report of ``--plan``: lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llava_twophase.text import counted
from llava_twophase.train.plan.memory import MemoryPlan
from llava_twophase.train.plan.steps import Lengths, Steps


@dataclass(frozen=True)
class PlanReport:
    """Everything that ``--plan`` prints.

    Attributes:
        records: Records to train on.
        held_out: Records to evaluate on.
        lengths: Positions of the samples.
        steps: Optimizer steps, and what each of them holds.
        dtype: The LLM's weights, in words.
        device: The device, in words.
        process: Bytes that Python and its libraries take of the same memory; 0 for an accelerator.
        memory: Memory of each device.
        alternatives: What to type instead, and its plan; for a run that does not fit.
        checkpoint_bytes: The most that one checkpoint takes.
        checkpoints: Checkpoints that are on disk at the same time.
        disk_free: Free bytes on the disk of ``--output_dir``.
        sample_seconds: Time of one sample on one device; None without a measurement.
        time_note: What was measured, or why nothing was.
    """

    records: int
    held_out: int
    lengths: Lengths
    steps: Steps
    dtype: str
    device: str
    process: int
    memory: MemoryPlan
    checkpoint_bytes: int
    checkpoints: int
    disk_free: int
    sample_seconds: float | None
    time_note: str
    alternatives: Sequence[tuple[str, MemoryPlan]] = field(default=())

    def text(self) -> str:
        """Return the report."""
        sections = {
            "data": self._data(),
            "steps": self._steps(),
            "micro-batches": self._micro_batches(),
            "memory": self._memory(),
            "fits": self._verdict(),
            "checkpoint": self._disk(),
            "time": self._time(),
        }
        return "\n".join(
            f"{title if number == 0 else '':<15}{line}"
            for title, lines in sections.items()
            for number, line in enumerate(lines)
        )

    def _data(self) -> list[str]:
        lengths = self.lengths
        shares = ", ".join(f"{share} %: {positions}" for share, positions in lengths.percentiles.items())
        approximate = "" if lengths.exact else " or more"
        return [
            f"{counted(self.records, 'record')}, {self.held_out} held out",
            f"positions of a sample, {lengths.image_tokens} of them its image: {shares}; "
            f"longest: {lengths.longest}{approximate}; {counted(lengths.truncated, 'caption')} truncated",
        ]

    def _steps(self) -> list[str]:
        steps = self.steps
        return [
            f"{counted(steps.total, 'optimizer step')}, {steps.per_epoch} in an epoch",
            f"{steps.samples} samples in a step: {counted(steps.ranks, 'device')} x batches of {steps.batch} x "
            f"{steps.accumulation} accumulated",
        ]

    def _micro_batches(self) -> list[str]:
        passes = -(-self.memory.batch // self.memory.samples)
        needed, logits = (size / 1e9 for size in self.memory.typical)
        return [
            f"{self.memory.micro_batching}; {passes} for a batch of {self.memory.batch}",
            f"about {needed:.3f} GB each in the first batch; its logits and their gradients alone take {logits:.3f} GB",
        ]

    def _memory(self) -> list[str]:
        rows = {**self.memory.parts, "peak": self.memory.peak, "free": self.memory.free}
        title = f"GB of each {'process' if self.process else 'device'}: {self.device}; the LLM in {self.dtype}"
        lines = [title, *(f"{size / 1e9:9.3f}  {part}" for part, size in rows.items())]
        if self.process:
            lines.append(f"{self.process / 1e9:9.3f}  Python and its libraries, beside the peak")
        return lines

    def _verdict(self) -> list[str]:
        if self.memory.fits:
            return ["yes"]
        missing = (self.memory.peak - self.memory.free) / 1e9
        if not self.alternatives:
            return [f"no, {missing:.1f} GB are missing, and no change of the flags makes it fit: give a smaller LLM"]
        return [
            f"no, {missing:.1f} GB are missing; these fit:",
            *(f"{advice} ({plan.peak / 1e9:.1f} GB)" for advice, plan in self.alternatives),
        ]

    def _disk(self) -> list[str]:
        size, free = self.checkpoint_bytes / 1e9, self.disk_free / 1e9
        return [f"at most {size:.3f} GB, {self.checkpoints} on disk at once; {free:.1f} GB are free"]

    def _time(self) -> list[str]:
        if self.sample_seconds is None:
            return [f"not known: {self.time_note}"]
        epoch = self.sample_seconds * self.records / self.steps.ranks
        epochs = self.steps.total / self.steps.per_epoch
        return [
            f"{duration(epoch)} for an epoch, {duration(epoch * epochs)} for {epochs:g}; "
            f"{1 / self.sample_seconds:.3g} samples a second on each device",
            self.time_note,
        ]


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
