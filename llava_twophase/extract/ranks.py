"""What the ranks of one extraction tell each other: their progress, and the reason why all must stop.

Ranks share no work, so they only exchange short texts, through a ``TCPStore``, torch's key-value store over TCP.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from llava_twophase.distributed import Ranks, rendezvous_address
from llava_twophase.errors import UserError

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
SILENT_SECONDS = 60.0
"""A rank that has sent nothing for so long is taken for dead."""
JOIN_SECONDS = 300.0
"""How long all ranks may take to start."""


class RankMessages:
    """Messages between the ranks of a run; with one rank, it does nothing.

    As a context: an exception in the block stops the other ranks too, and so does a rank that dies.

    Args:
        ranks: This process among the run's.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._store: Any = None
        self._progress: Counter[str] = Counter()
        self._progress_of: dict[int, Counter[str]] = {}
        self._reason: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="rank-messages", daemon=True)

    def __enter__(self) -> RankMessages:
        if self.ranks.world_size > 1:
            self._store = _connect(self.ranks)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._store is None:
            return
        self._stop.set()
        self._thread.join()
        try:
            if error is not None and self._reason is None:
                text = str(error).partition("\n")[0] or type(error).__name__
                self._store.set("stop", f"rank {self.ranks.rank} stopped: {text}")
            self._store.set(f"left/{self.ranks.rank}", "")
            if self.ranks.is_main:
                # The store may be in this process: it must not end before the others have read the last messages.
                left = [f"left/{rank}" for rank in range(self.ranks.world_size)]
                _wait_until(lambda: self._store.check(left), 5 * BEAT_SECONDS if error else SILENT_SECONDS)
        except RuntimeError as lost:
            logger.debug("the store is gone: %s", lost)

    def report_progress(self, progress: Counter[str]) -> None:
        """Tell the other ranks this rank's progress: names and counts."""
        self._progress = progress

    def total_progress(self) -> Counter[str]:
        """Return the sum of all ranks' progress, as far as this rank knows it; rank 0 knows all."""
        others = (progress for rank, progress in self._progress_of.items() if rank != self.ranks.rank)
        return sum(others, self._progress.copy())

    def raise_if_stopped(self) -> None:
        """Raise if another rank failed or died.

        Raises:
            UserError: With the reason.
        """
        if self._reason is not None:
            raise UserError(f"{self._reason}; sealed shards are kept, run the same command again to resume")

    def send(self, name: str, value: Any) -> None:
        """Send a JSON value to all ranks, once for each name."""
        if self._store is not None:
            self._store.set(name, json.dumps(value))

    def receive(self, name: str, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """Wait for a value that a rank sends.

        Args:
            name: Its name.
            meanwhile: Called several times a second while waiting.

        Raises:
            UserError: A rank failed or died meanwhile.
        """
        self.wait(lambda: self._store.check([name]), meanwhile)
        return json.loads(self._store.get(name))

    def wait(self, condition: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until a condition is true that other ranks bring about.

        Raises:
            UserError: A rank failed or died meanwhile.
        """
        while not self._ask(condition):
            self.raise_if_stopped()
            meanwhile()
            time.sleep(BEAT_SECONDS / 5)

    def _ask(self, condition: Callable[[], bool]) -> bool:
        try:
            return condition()
        except RuntimeError as error:  # torch's DistError: the store ended with its rank
            self._reason = self._reason or f"rank 0 is gone ({error})".partition("\n")[0]
            self.raise_if_stopped()
            raise

    def _beat(self) -> None:
        heard: dict[int, tuple[bytes, float]] = {}
        number, started = 0, time.monotonic()
        # Rank 0 watches all others, and they watch rank 0: traffic grows with the number of ranks, not its square.
        watched = range(1, self.ranks.world_size) if self.ranks.is_main else [0]
        while not self._stop.wait(BEAT_SECONDS):
            number += 1
            try:
                self._store.set(f"beat/{self.ranks.rank}", json.dumps([number, self._progress]))
                if self._store.check(["stop"]):
                    self._reason = self._store.get("stop").decode()
                    return
                for rank in watched:
                    self._listen(rank, heard, started)
            except RuntimeError as error:
                self._reason = f"rank 0 is gone ({error})".partition("\n")[0]
            if self._reason is not None:
                return

    def _listen(self, rank: int, heard: dict[int, tuple[bytes, float]], started: float) -> None:
        now = time.monotonic()
        beat = self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else b""
        last, since = heard.get(rank, (b"", started))
        if beat != last:
            heard[rank] = (beat, now)
            self._progress_of[rank] = Counter(json.loads(beat)[1])
        elif self._store.check([f"left/{rank}"]):
            return
        elif now - since > (SILENT_SECONDS if beat else JOIN_SECONDS):
            self._reason = f"rank {rank} is gone: it sent nothing for {now - since:.0f} s"
            self._store.set("stop", self._reason)


def _connect(ranks: Ranks) -> Any:
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented, not in __all__

    host, port = rendezvous_address()
    # torchrun may run the store itself, at the address that it gives.
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            host,
            port,
            is_master=ranks.is_main and not kept,
            timeout=timedelta(seconds=JOIN_SECONDS),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise UserError(
            f"rank {ranks.rank} cannot reach rank 0 at {host}:{port}: {error}; set MASTER_ADDR and MASTER_PORT to a "
            "host and a free port that all nodes reach"
        ) from None
    return PrefixStore(f"llava_twophase/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(BEAT_SECONDS / 5)
