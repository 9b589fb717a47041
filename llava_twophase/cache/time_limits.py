"""How long a request may take before it is repeated, from how long recent requests took.

A connection that stalls would make a step wait for a fixed time limit, which must be long enough for slow networks.
Amazon advises to repeat slow requests early (Amazon S3 User Guide, "Performance design patterns for Amazon S3").
"""

from __future__ import annotations

from collections import deque

# In seconds. FIRST is for requests of a length about which nothing is known yet, UNSIZED for those whose length is not
# known: listings and small files.
SHORTEST, FIRST, UNSIZED, LONGEST = 2.0, 5.0, 60.0, 300.0
# In bytes per second of all requests together: what the first limit expects, and what opening a cache waits for.
EXPECTED_RATE, LOWEST_RATE = 1e6, 1e5
_FACTOR = 4.0
_SAMPLES, _ENOUGH_SAMPLES = 100, 16


class TimeLimits:
    """Time limits of requests that share a link. Threads may share an instance.

    Args:
        requests: Most requests at the same time: the time of one includes what the others transfer.
    """

    def __init__(self, requests: int) -> None:
        self._requests = requests
        self._taken: deque[tuple[int, float]] = deque(maxlen=_SAMPLES)

    def add(self, nbytes: int, seconds: float) -> None:
        """Record how long a request took that succeeded."""
        self._taken.append((nbytes, seconds))

    def first(self, nbytes: int) -> float:
        """Return the time limit of a request's first attempt.

        Four times the slowest of the last 100 requests, without those of less than half the length. If fewer than 16
        remain: 5 s, or what all requests at once take at 1 MB/s if that is longer.
        """
        recent = [seconds for other, seconds in list(self._taken) if 2 * other >= nbytes]
        if len(recent) < _ENOUGH_SAMPLES:
            return min(LONGEST, max(FIRST, nbytes * self._requests / EXPECTED_RATE))
        return min(LONGEST, max(SHORTEST, _FACTOR * max(recent)))

    def after(self, limit: float) -> float:
        """Return the time limit of a request that did not finish in this time: a network may have become slower."""
        return min(LONGEST, _FACTOR * limit)

    def at_lowest_rate(self, nbytes: int) -> float:
        """Return how long a request takes at 0.1 MB/s while all others are transferred too."""
        return min(LONGEST, nbytes * self._requests / LOWEST_RATE)
