"""Repeat failed requests with growing delays, until they succeed or cannot."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

from llava_twophase.cache.remote_errors import explain, is_final

logger = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.2, 15.0
# An outage fails many requests; it is logged once in so many seconds.
_SILENCE = 30.0

_T = TypeVar("_T")


class Repetition:
    """Calls functions until they succeed. Threads may share an instance."""

    def __init__(self) -> None:
        self._random = random.Random()  # the global one belongs to the user's seed
        self._silent_until = 0.0

    def __call__(
        self,
        call: Callable[[], _T],
        url: str,
        patience: float,
        given_up: threading.Event | None = None,
        action: str = "read",
    ) -> _T:
        """Return what a function returns, once it succeeds.

        Args:
            call: The function.
            url: What it requests, for errors.
            patience: Seconds after which it is not called again.
            given_up: Once it is set, the function is not called again.
            action: What the function does, for errors.

        Raises:
            UserError: It did not succeed in time, or its error is final.
        """
        deadline, delay = monotonic() + patience, FIRST_DELAY
        given_up = given_up or threading.Event()
        while True:
            try:
                return call()
            except Exception as error:
                if is_final(error) or given_up.is_set() or monotonic() + delay > deadline:
                    raise explain(url, error, action) from error
                if delay > 2 * FIRST_DELAY and monotonic() > self._silent_until:
                    self._silent_until = monotonic() + _SILENCE
                    logger.warning("%s: %s: %s; repeating the request", url, type(error).__name__, error)
                failure = error
            # Several processes that failed together should not return together.
            if _wait(delay * self._random.uniform(0.5, 1.0), given_up):
                raise explain(url, failure, action) from failure
            delay = min(2 * delay, LONGEST_DELAY)


def _wait(seconds: float, given_up: threading.Event) -> bool:
    """Wait, and return whether the call was given up meanwhile."""
    return given_up.wait(seconds)
