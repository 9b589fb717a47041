"""A link with a simulated clock: each request takes as long as its share of a rate gives, without waiting for it."""

import threading
from collections import Counter

from llava_twophase.cache import remote, repetition
from llava_twophase.cache.remote import RemoteStorage


class SlowLink:
    """Makes requests for ranges take simulated time. Each thread has its own clock, as if all of them started together.

    Args:
        monkeypatch: Restores clocks and requests.
        rate: Bytes per second of the link.
        sharing: Requests that are always in flight; each transfers this fraction of the rate.

    Attributes:
        attempts: Requests for each range.
    """

    def __init__(self, monkeypatch, rate, sharing):
        self.attempts, self._lock = Counter(), threading.Lock()
        clock, transfer = threading.local(), RemoteStorage._range

        def now():
            return getattr(clock, "now", 0.0)

        def request(storage, name, start, end, timeout=float("inf")):
            with self._lock:
                self.attempts[name, start, end] += 1
            seconds = (end - start) * sharing / rate
            clock.now = now() + min(seconds, timeout)
            if seconds > timeout:
                raise TimeoutError(f"{seconds:.1f} s needed, {timeout:.1f} s allowed")
            return transfer(storage, name, start, end)

        def wait(seconds, given_up):
            clock.now = now() + seconds
            return given_up.is_set()

        monkeypatch.setattr(RemoteStorage, "_range", request)
        monkeypatch.setattr(remote, "monotonic", now)
        monkeypatch.setattr(repetition, "monotonic", now)
        monkeypatch.setattr(repetition, "_wait", wait)
