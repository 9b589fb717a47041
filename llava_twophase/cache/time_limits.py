"""How long a request may take before it is repeated, from how long recent requests took.

A connection that stalls would make a step wait for a fixed time limit, which must be long enough for slow networks.
Amazon advises to repeat slow requests early (Amazon S3 User Guide, "Performance design patterns for Amazon S3").
"""

from __future__ import annotations

from collections import deque

# In seconds. FIRST is for the first requests, when nothing is known.
SHORTEST, FIRST, LONGEST = 2.0, 5.0, 60.0
_FACTOR = 4.0
_SAMPLES, _ENOUGH_SAMPLES = 100, 16


class TimeLimits:
    """Time limits of requests of similar size. Threads may share an instance."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_SAMPLES)

    def add(self, seconds: float) -> None:
        """Record how long a request took that succeeded."""
        self._seconds.append(seconds)

    def first(self) -> float:
        """Return the time limit of a request's first attempt: four times what the slowest of the last 100 took."""
        recent = list(self._seconds)
        return min(LONGEST, max(SHORTEST, _FACTOR * max(recent))) if len(recent) >= _ENOUGH_SAMPLES else FIRST

    def after(self, limit: float) -> float:
        """Return the time limit of a request that did not finish in this time: a network may have become slower."""
        return min(LONGEST, _FACTOR * limit)
