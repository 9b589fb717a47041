"""How many CPUs this process may use, and how much of the CPU time that it asked for it received.

Call ``limit_torch_threads`` before the first torch operation, and use ``available_cpus`` for the default number of
worker processes. To find out whether a run was slowed down by a busy or limited CPU::

    meter = CpuMeter()
    ...                                  # the work
    if meter.is_due():                   # once, after 20 seconds: a slow run should not have to end first
        advice = meter.usage().advice()  # None, or one sentence that says what to set
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A process that received less than this part of the CPU time that it asked for is starved. Two threads beside two other
# busy threads on two CPUs receive a half, and OpenMP threads that wait for each other make that much slower than half.
_STARVED_SHARE = 0.6
# Without scheduler statistics, threads that had nothing to do count as waiting, so the limit is lower.
_STARVED_SHARE_ESTIMATED = 0.25
# Shorter runs are not judged: one busy moment of the machine would decide.
_SECONDS_JUDGED = 3.0


def available_cpus(root: str | Path = "/") -> int:
    """Return how many CPUs this process may use: its CPU affinity, limited by the CPU quota of its cgroups.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.

    Returns:
        At least 1. A quota of 1.5 CPUs counts as 2.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        count = os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def cpu_quota(root: str | Path = "/") -> float | None:
    """Return the lowest CPU quota among this process's cgroups (version 1 and 2) in CPUs; None without a quota.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.
    """
    quotas = [quota for folder in _cgroup_folders(Path(root)) for quota in (_quota_v2(folder), _quota_v1(folder))]
    return min((quota for quota in quotas if quota is not None), default=None)


def limit_torch_threads() -> int:
    """Limit the threads of torch's CPU operations to the CPUs that are available, unless OMP_NUM_THREADS is set.

    Returns:
        The number of threads.
    """
    import torch

    threads = torch.get_num_threads()
    if not os.environ.get("OMP_NUM_THREADS") and threads > available_cpus():
        threads = available_cpus()
        torch.set_num_threads(threads)
    return threads


@dataclass(frozen=True)
class CpuUsage:
    """CPU time of one or several processes.

    Attributes:
        wall: Seconds measured.
        received: Seconds of CPU time.
        waited: Seconds in which a thread was ready to run but had no CPU.
        estimated: Whether ``waited`` is only estimated, from the number of threads.
    """

    wall: float = 0.0
    received: float = 0.0
    waited: float = 0.0
    estimated: bool = False

    def __add__(self, other: CpuUsage) -> CpuUsage:
        """Add the usage of another process that ran at the same time."""
        return CpuUsage(
            wall=max(self.wall, other.wall),
            received=self.received + other.received,
            waited=self.waited + other.waited,
            estimated=self.estimated or other.estimated,
        )

    @property
    def share(self) -> float:
        """The part of the CPU time asked for that was received."""
        asked = self.received + self.waited
        return self.received / asked if asked else 1.0

    def is_starved(self) -> bool:
        """Return whether the work was slowed down by a busy or limited CPU."""
        limit = _STARVED_SHARE_ESTIMATED if self.estimated else _STARVED_SHARE
        # A process that hardly needs the CPU is not slowed down by waiting for it.
        busy = self.received + self.waited > 0.3 * self.wall
        return self.wall >= _SECONDS_JUDGED and busy and self.share < limit

    def advice(self, workers_flag: str | None = "--num_workers") -> str | None:
        """Return a sentence that says what to set; None if the CPU did not slow the work down.

        Args:
            workers_flag: The command's flag for the number of worker processes; None if there are none.
        """
        if not self.is_starved():
            return None
        threads = "set OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=passive, "
        if os.environ.get("OMP_NUM_THREADS") == "1":
            threads = ""
        workers = "" if workers_flag is None else f"lower {workers_flag}, "
        others = f"{threads}{workers}or " if threads or workers else ""
        return (
            f"this process received {self.share:.0%} of the CPU time that it asked for, because other processes or a "
            f"CPU limit take the rest: {others}use a machine with free CPUs "
            f"(this process may use {available_cpus()})"
        )


class CpuMeter:
    """Measures the CPU time of this process, all of its threads included, from now on.

    Child processes are not included: a worker process measures its own usage and sends it.
    """

    def __init__(self) -> None:
        self._advised = False
        self._wall = time.perf_counter()
        self._received = time.process_time()
        self._waits = _thread_waits()

    def usage(self, idle: float = 0.0, threads: int = 1) -> CpuUsage:
        """Return the usage since the meter was made.

        Args:
            idle: Seconds in which this process waited for something else than the CPU, such as a disk.
            threads: Compute threads, used only where the system has no scheduler statistics.
        """
        wall = time.perf_counter() - self._wall
        received = time.process_time() - self._received
        waits = _thread_waits()
        if waits:
            # A thread that has ended is not counted; compute threads live as long as the process.
            waited = sum(seconds - self._waits.get(thread, 0.0) for thread, seconds in waits.items())
            return CpuUsage(wall, received, max(0.0, waited))
        return CpuUsage(wall, received, max(0.0, (wall - idle) * threads - received), estimated=True)

    def is_due(self, after: float = 20.0) -> bool:
        """Return True once, at the first call after some seconds: the time to look whether the run is slowed down."""
        if self._advised or time.perf_counter() - self._wall < after:
            return False
        self._advised = True
        return True


def _thread_waits() -> dict[str, float]:
    # Thread id -> seconds spent ready to run without a CPU (the second number of schedstat, in nanoseconds).
    waits = {}
    try:
        for thread in os.listdir("/proc/self/task"):
            try:
                with open(f"/proc/self/task/{thread}/schedstat", encoding="ascii") as file:
                    waits[thread] = int(file.read().split()[1]) / 1e9
            except (FileNotFoundError, ProcessLookupError):  # the thread has just ended
                continue
    except (OSError, ValueError, IndexError):
        return {}
    return waits


def _cgroup_folders(root: Path) -> Iterator[Path]:
    # The folders of this process's cgroups and all of their parents. Inside a container the paths of /proc/self/cgroup
    # may be those of the host: then only the mount points exist, which hold the container's own limits.
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (controllers, "cpu", "cpu,cpuacct") if controllers else ("", "unified"):
            folder = root / "sys/fs/cgroup" / mount
            yield folder
            for part in Path(path).parts[1:]:
                folder = folder / part
                yield folder


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        period = int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
