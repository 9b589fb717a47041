"""Where the time of an extraction goes, and what would shorten it; knows nothing of how the stages work."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class StageTimes:
    """Seconds of one rank, stage by stage; stages run at the same time, so they do not add up to ``total``.

    Attributes:
        read: Worker processes reading image files, summed.
        decode: Worker processes decoding, resizing and cropping, summed.
        encode: Tower and codec, on the device.
        copy: Rows from the device to the host.
        write: Hashing and writing rows.
        seal: Syncing and renaming shards.
        starved: The device waiting for pictures.
        stalled: The device waiting for the disk.
        total: From the first batch to the last sealed shard.
    """

    read: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    copy: float = 0.0
    write: float = 0.0
    seal: float = 0.0
    starved: float = 0.0
    stalled: float = 0.0
    total: float = 0.0

    def bound_by(self) -> str:
        """Name what the run waited for most: ``read``, ``decode``, ``disk`` or ``tower``."""
        busy = self.total - self.starved - self.stalled
        slowest = max(busy, self.starved, self.stalled)
        if slowest == self.starved:
            return "read" if self.read > self.decode else "decode"
        return "disk" if slowest == self.stalled else "tower"

    def describe(self) -> str:
        """Return the times and the lever in two lines."""
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in asdict(self).items() if name != "total")
        bound = self.bound_by()
        return f"seconds of {self.total:.1f}: {seconds}\nbound by: {bound}; {_LEVERS[bound]}"


_LEVERS = {
    "tower": "more ranks (torchrun --nproc_per_node) or a faster --device shorten the run",
    "decode": "a higher --num_workers shortens the run, as long as there are cores",
    "read": "images on a faster disk, or in one images.zip, or a higher --num_workers shorten the run",
    "disk": "a --feature_cache on a faster disk, or --storage_dtype int8, shortens the run",
}
