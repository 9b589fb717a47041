"""Several ranks: every image exactly once, the same shards as one rank, and all end when one does."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

import drawn
from extract.server import files
from helpers import SCRIPTS, free_port, process_environment, run
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.distributed import Ranks
from llava_twophase.errors import UserError
from llava_twophase.extract import ranks
from llava_twophase.extract.ranks import RankMessages

# These tests fork before they start threads of their own; Python 3.12 warns of any thread, numpy's idle ones too.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

COMMAND = SCRIPTS["llava-extract-features"]


def start_ranks(server, command, world, **env):
    """As a launcher that names the address does it."""
    common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **env}
    return [server.start(command, RANK=rank, LOCAL_RANK=rank, **common) for rank in range(world)]


def test_torchrun_with_two_ranks(command, whole, tmp_path):
    done = run(["torchrun", "--nproc_per_node", "2", "--master_port", free_port(), COMMAND, *command(num_workers=1)],
               SOURCE_DATE_EPOCH=0)  # fmt: skip
    found = files(tmp_path / "cache")
    assert {name: found[name] for name in found if name.endswith(".h5")} == {
        name: whole[name] for name in whole if name.endswith(".h5")
    }
    assert done.stderr.count("complete, 29 images in 4 shards") == 1


def test_torchrun_on_two_nodes(command, whole, tmp_path):
    port = free_port()
    nodes = [
        subprocess.Popen(
            [
                "torchrun",
                "--nnodes",
                "2",
                "--nproc_per_node",
                "1",
                "--node_rank",
                str(node),
                "--master_addr",
                "127.0.0.1",
                "--master_port",
                str(port),
                COMMAND,
                *command(),
            ],
            env=process_environment(SOURCE_DATE_EPOCH=0),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )  # fmt: skip
        for node in range(2)
    ]
    try:
        logs = [node.communicate(timeout=300)[1] for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.communicate()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(logs)
    found = files(tmp_path / "cache")
    assert all(found[name] == whole[name] for name in whole if name.endswith(".h5"))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_ranks_gives_the_same_cache(server, command, whole, tmp_path, world):
    """Four shards over two, three and five ranks: also where they do not divide, or one has nothing to do."""
    runs = start_ranks(server, command(), world)
    assert [rank.wait() for rank in runs] == [0] * world, "\n".join(rank.log() for rank in runs)
    assert files(tmp_path / "cache") == whole
    runs = start_ranks(server, command(), world)
    assert [rank.wait() for rank in runs] == [0] * world
    assert "nothing to do" in runs[0].log()


def test_ten_images_over_three_ranks(server, command, image_set, tmp_path):
    records = drawn.write_records(image_set.records[:10], tmp_path / "r.json")
    runs = start_ranks(server, command(data_path=records, images_per_shard=1), 3)
    assert [rank.wait() for rank in runs] == [0, 0, 0]
    assert list(FeatureCache(tmp_path / "cache").keys()) == image_set.keys[:10]


def test_slurm_names_its_ranks_in_its_own_way(server, command, whole, tmp_path):
    common = {
        "SLURM_NTASKS": 2,
        "SLURM_STEP_NUM_TASKS": 2,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": free_port() - 20000,
    }
    runs = [server.start(command(), SLURM_PROCID=rank, SLURM_LOCALID=rank, **common) for rank in range(2)]
    assert [rank.wait() for rank in runs] == [0, 0], "\n".join(rank.log() for rank in runs)
    assert files(tmp_path / "cache") == whole


def test_a_rank_that_fails_ends_the_others_with_its_reason(server, command, image_set, tmp_path):
    port = free_port()
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    fewer = drawn.write_records(image_set.records[:20], tmp_path / "fewer.json")
    runs = [
        server.start(command(), RANK=0, **common),
        server.start(command(data_path=fewer), RANK=1, **common),
    ]
    assert [rank.wait() for rank in runs] == [1, 1]
    assert "rank 1 plans other work than rank 0" in runs[1].log()
    assert "rank 1 stopped: rank 1 plans other work" in runs[0].log()


def test_rank_0_that_fails_ends_the_others(server, command, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").touch()
    runs = start_ranks(server, command(), 3)
    assert [rank.wait() for rank in runs] == [1, 1, 1]
    assert all("is not a feature cache" in rank.log() for rank in runs)


def test_torchrun_ends_when_a_rank_is_killed(command, tmp_path):
    """The victim is found by its environment, and dies as the out-of-memory killer lets it die."""
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
         COMMAND, *command(images_per_shard=1, batch_size=1)],
        env=process_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        while not list((tmp_path / "cache").glob("shards/*.h5")):
            assert launcher.poll() is None
            time.sleep(0.05)
        for entry in os.listdir("/proc"):
            if entry.isdigit() and is_rank(int(entry), launcher.pid, 1):
                os.kill(int(entry), signal.SIGKILL)
        assert launcher.wait(120) != 0
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    done = run(["python", COMMAND, *command(images_per_shard=1, batch_size=1)])
    assert "complete, 29 images" in done.stderr


def is_rank(pid, launcher, rank):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environ = file.read().split(b"\0")
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            parent = int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return False
    return parent == launcher and f"RANK={rank}".encode() in environ


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
def test_a_rank_that_falls_silent_ends_the_others(quick, killed):
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


def test_a_rank_that_never_joins_ends_rank_0(quick):
    with pytest.raises(UserError, match="rank 1 is gone"), RankMessages(Ranks(0, 2)) as mine:
        mine.receive("what never comes")


def test_counts_of_all_ranks_add_up(quick):
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


def test_one_rank_needs_no_one():
    with RankMessages(Ranks()) as mine:
        mine.send("x", 1)
        mine.report_progress(Counter(images=3))
        mine.raise_if_stopped()
        assert mine.total_progress() == Counter(images=3)
