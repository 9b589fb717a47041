"""How long each step of the extraction pipeline took, and what would shorten the run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from llava_twophase.cpu import CpuUsage


@dataclass
class Timings:
    """Seconds spent on one rank. The steps overlap, so they do not add up to ``total``.

    Attributes:
        read: Worker processes reading image files, summed over the workers.
        decode: Worker processes decoding, resizing and cropping, summed over the workers.
        encode: Tower and codec, on the device.
        copy: Rows from the device to the host.
        write: Hashing and writing rows.
        seal: Syncing and renaming shards.
        waiting_for_images: The tower waiting for decoded images.
        waiting_for_disk: The tower waiting until rows are written.
        total: From the first batch to the last sealed shard.
        cpu: CPU time of this process and its worker processes.
    """

    read: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    copy: float = 0.0
    write: float = 0.0
    seal: float = 0.0
    waiting_for_images: float = 0.0
    waiting_for_disk: float = 0.0
    total: float = 0.0
    cpu: CpuUsage = field(default_factory=CpuUsage)

    def bound_by(self) -> str:
        """Return what limits the run: ``read``, ``decode``, ``disk``, ``tower``, or ``cpu`` if others use the CPU."""
        busy = self.total - self.waiting_for_images - self.waiting_for_disk
        longest = max(busy, self.waiting_for_images, self.waiting_for_disk)
        if longest == self.waiting_for_images and self.read > self.decode:
            return "read"
        if longest == self.waiting_for_disk and longest > self.waiting_for_images:
            return "disk"
        if self.cpu.is_starved():
            return "cpu"
        return "decode" if longest == self.waiting_for_images else "tower"

    def describe(self, workers_flag: str | None = "--num_workers") -> str:
        """Return the timings and the advice that follows from them, in two lines.

        Args:
            workers_flag: The flag for the number of worker processes; None if there are none.
        """
        names = [field.name for field in fields(self) if field.name not in ("total", "cpu")]
        seconds = ", ".join(f"{name.replace('_', ' ')} {getattr(self, name):.1f}" for name in names)
        bound = self.bound_by()
        advice = _ADVICE.get(bound) or self.cpu.advice(workers_flag)
        return f"seconds of {self.total:.1f}: {seconds}\nbound by: {bound}; {advice}"


_ADVICE = {
    "tower": "more ranks (torchrun --nproc_per_node) or a faster --device shorten the run",
    "decode": "a higher --num_workers shortens the run, as long as there are free CPUs",
    "read": "images on a faster disk, or in one images.zip, or a higher --num_workers shorten the run",
    "disk": "a --feature_cache on a faster disk, or --storage_dtype int8, shortens the run",
}
