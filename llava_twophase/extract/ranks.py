"""The ranks of one extraction: how far each is, and one reason for all to stop; knows nothing of images.

Ranks share no work, so all that they exchange is a few short texts in a ``TCPStore``, torch's rendezvous over TCP.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from llava_twophase.distributed import Ranks
from llava_twophase.errors import UserError

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
SILENT_SECONDS = 60.0
"""A rank that has not been heard of for so long is dead."""
JOIN_SECONDS = 300.0
"""How long all ranks may take to start."""


class Peers:
    """What the ranks of a run know of each other; with one rank, nothing happens.

    As a context: an error inside ends the other ranks too, and a rank that dies ends all, whoever killed it.

    Args:
        ranks: This process among them.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._store: Any = None
        self._state: Counter[str] = Counter()
        self._states: dict[int, Counter[str]] = {}
        self._reason: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="peers", daemon=True)

    def __enter__(self) -> Peers:
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
                # The store may live in this process: the others must have read it before it goes.
                left = [f"left/{rank}" for rank in range(self.ranks.world_size)]
                _wait_until(lambda: self._store.check(left), 5 * BEAT_SECONDS if error else SILENT_SECONDS)
        except RuntimeError as lost:
            logger.debug("the store is gone: %s", lost)

    def publish(self, state: Counter[str]) -> None:
        """Say how far this rank is: names and counts."""
        self._state = state

    def total(self) -> Counter[str]:
        """Return the sum of all ranks' counts, as far as they are known here; rank 0 knows all."""
        others = (state for rank, state in self._states.items() if rank != self.ranks.rank)
        return sum(others, self._state.copy())

    def check(self) -> None:
        """Raise where another rank failed or is gone.

        Raises:
            UserError: With the reason.
        """
        if self._reason is not None:
            raise UserError(f"{self._reason}; sealed shards stay, run the same command again to go on")

    def tell(self, name: str, value: Any) -> None:
        """Say something to all ranks, once."""
        if self._store is not None:
            self._store.set(name, json.dumps(value))

    def hear(self, name: str, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """Wait for what a rank tells.

        Args:
            name: What it tells.
            meanwhile: Called now and then.

        Raises:
            UserError: A rank failed meanwhile.
        """
        self.wait(lambda: self._store.check([name]), meanwhile)
        return json.loads(self._store.get(name))

    def wait(self, condition: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for something that the other ranks bring about.

        Raises:
            UserError: A rank failed meanwhile.
        """
        while not self._ask(condition):
            self.check()
            meanwhile()
            time.sleep(BEAT_SECONDS / 5)

    def _ask(self, condition: Callable[[], bool]) -> bool:
        try:
            return condition()
        except RuntimeError as error:  # torch's DistError, where the store went with its rank
            self._reason = self._reason or f"rank 0 is gone ({error})".partition("\n")[0]
            self.check()
            raise

    def _beat(self) -> None:
        heard: dict[int, tuple[bytes, float]] = {}
        number, started = 0, time.monotonic()
        # Rank 0 watches all, the others rank 0: so the traffic grows with the ranks, not with their square.
        watched = range(1, self.ranks.world_size) if self.ranks.is_main else [0]
        while not self._stop.wait(BEAT_SECONDS):
            number += 1
            try:
                self._store.set(f"beat/{self.ranks.rank}", json.dumps([number, self._state]))
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
            self._states[rank] = Counter(json.loads(beat)[1])
        elif self._store.check([f"left/{rank}"]):
            return
        elif now - since > (SILENT_SECONDS if beat else JOIN_SECONDS):
            self._reason = f"rank {rank} is gone: not heard of for {now - since:.0f} s"
            self._store.set("stop", self._reason)


def _connect(ranks: Ranks) -> Any:
    from torch.distributed import PrefixStore, TCPStore

    host, port = _address()
    # Under torchrun the launcher itself keeps the store, on the port that it names.
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            host, port, is_master=ranks.is_main and not kept, timeout=timedelta(seconds=JOIN_SECONDS),
            wait_for_workers=False,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(f"rank {ranks.rank} cannot reach rank 0 at {host}:{port}: {error}; set MASTER_ADDR and "
                        "MASTER_PORT to a host and a free port that all nodes reach") from None  # fmt: skip
    return PrefixStore(f"llava_twophase/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _address() -> tuple[str, int]:
    # torchrun and DeepSpeed name the address; under plain srun it is the step's first node and a port from the job.
    env = os.environ
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or "127.0.0.1"
    job = int(env.get("SLURM_JOB_ID", "0")) + int(env.get("SLURM_STEP_ID", "0"))
    return env.get("MASTER_ADDR") or first_node(nodes), int(env.get("MASTER_PORT") or 20000 + job % 20000)


def first_node(nodes: str) -> str:
    """Return the first name of a SLURM node list: ``gpu003`` of ``gpu[003-007,12],login1``."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(BEAT_SECONDS / 5)
