"""Messages between ranks: progress, and one reason for all to stop."""

import os
import signal
import time
from collections import Counter

import pytest

from helpers import free_port
from llava_twophase.distributed import Ranks
from llava_twophase.errors import UserError
from llava_twophase.extract import ranks
from llava_twophase.extract.ranks import RankMessages

# These tests fork before they start threads of their own; Python 3.12 warns of any thread, numpy's idle ones too.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def quick(monkeypatch):
    """A dead rank is noticed after a second instead of a minute."""
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(ranks, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(ranks, "JOIN_SECONDS", 3.0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


def silent_rank_0():
    """A rank 0 in another process that joins, beats a while and then says nothing more; returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            with RankMessages(Ranks(0, 2)) as mine:
                mine.report_progress(Counter(images=7))
                time.sleep(0.5)
                mine._stop.set()
                time.sleep(60)
        finally:
            os._exit(0)
    return pid


@pytest.mark.parametrize("killed", [True, False])
def test_a_silent_rank_stops_the_others(quick, killed):
    pid = silent_rank_0()
    try:
        with pytest.raises(UserError, match="rank 0 is gone"), RankMessages(Ranks(1, 2)) as mine:
            time.sleep(0.3)
            mine.raise_if_stopped()
            if killed:
                os.kill(pid, signal.SIGKILL)
            mine.receive("what never comes")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_rank_that_never_joins_stops_rank_0(quick):
    with pytest.raises(UserError, match="rank 1 is gone"), RankMessages(Ranks(0, 2)) as mine:
        mine.receive("what never comes")


def test_total_progress_adds_up_all_ranks(quick):
    pid = os.fork()
    if pid == 0:
        try:
            with RankMessages(Ranks(1, 2)) as mine:
                mine.report_progress(Counter(images=5, quarantined=1))
                mine.receive("enough")
        finally:
            os._exit(0)
    with RankMessages(Ranks(0, 2)) as mine:
        mine.report_progress(Counter(images=2))
        mine.wait(lambda: mine.total_progress() == Counter(images=7, quarantined=1))
        mine.send("enough", True)
    assert os.waitpid(pid, 0)[1] == 0


def test_one_rank_needs_no_store():
    with RankMessages(Ranks()) as mine:
        mine.send("x", 1)
        mine.report_progress(Counter(images=3))
        mine.raise_if_stopped()
        assert mine.total_progress() == Counter(images=3)
