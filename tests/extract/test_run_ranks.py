"""Several ranks: every image exactly once, the same shards as one rank, and all stop if one fails."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import drawn
from commands import torchrun
from extract.server import files
from helpers import SCRIPTS, free_port, process_environment, run
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.distributed import Ranks
from llava_twophase.extract import run as run_module
from llava_twophase.extract.config import ExtractConfig
from llava_twophase.extract.plan import Plan, ShardWork

# These tests fork before they start threads of their own; Python 3.12 warns of any thread, numpy's idle ones too.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

COMMAND = SCRIPTS["llava-extract-features"]


def start_ranks(server, command, world, **env):
    """Start the ranks as a launcher does that sets the address."""
    common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **env}
    return [server.start(command, RANK=rank, LOCAL_RANK=rank, **common) for rank in range(world)]


def test_torchrun_with_two_ranks_gives_the_same_shards(command, expected_files, tmp_path):
    done = run([*torchrun(), COMMAND, *command(num_workers=1)], SOURCE_DATE_EPOCH=0)
    found = files(tmp_path / "cache")
    assert {name: found[name] for name in found if name.endswith(".h5")} == {
        name: expected_files[name] for name in expected_files if name.endswith(".h5")
    }
    assert done.stderr.count("complete, 29 images in 4 shards") == 1


def test_torchrun_on_two_nodes_gives_the_same_shards(command, expected_files, tmp_path):
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
    assert all(found[name] == expected_files[name] for name in expected_files if name.endswith(".h5"))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_ranks_gives_the_same_cache(server, command, expected_files, tmp_path, world):
    """Four shards over two, three and five ranks: they need not divide evenly, and a rank may have nothing to do."""
    runs = start_ranks(server, command(), world)
    assert [rank.wait() for rank in runs] == [0] * world, "\n".join(rank.log() for rank in runs)
    assert files(tmp_path / "cache") == expected_files
    runs = start_ranks(server, command(), world)
    assert [rank.wait() for rank in runs] == [0] * world
    assert "nothing to do" in runs[0].log()


def test_ten_images_over_three_ranks_are_extracted_once(server, command, image_set, tmp_path):
    records = drawn.write_records(image_set.records[:10], tmp_path / "r.json")
    runs = start_ranks(server, command(data_path=records, images_per_shard=1), 3)
    assert [rank.wait() for rank in runs] == [0, 0, 0]
    assert list(FeatureCache(tmp_path / "cache").keys()) == image_set.keys[:10]


def test_ranks_of_a_slurm_step_share_the_work(server, command, expected_files, tmp_path):
    common = {
        "SLURM_NTASKS": 2,
        "SLURM_STEP_ID": 0,
        "SLURM_STEP_NUM_TASKS": 2,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": free_port() - 20000,
    }
    runs = [server.start(command(), SLURM_PROCID=rank, SLURM_LOCALID=rank, **common) for rank in range(2)]
    assert [rank.wait() for rank in runs] == [0, 0], "\n".join(rank.log() for rank in runs)
    assert files(tmp_path / "cache") == expected_files


def test_a_rank_that_fails_stops_the_others_with_its_reason(server, command, image_set, tmp_path):
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


def test_rank_0_that_fails_stops_the_others(server, command, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").touch()
    runs = start_ranks(server, command(), 3)
    assert [rank.wait() for rank in runs] == [1, 1, 1]
    assert all("is not a feature cache" in rank.log() for rank in runs)


def test_torchrun_stops_after_a_rank_is_killed(command, tmp_path):
    """The rank is found by its environment, and killed with SIGKILL as the out-of-memory killer does."""
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


def test_a_program_in_a_batch_shell_is_one_process(server, command, expected_files, tmp_path):
    """sbatch sets the number of tasks in its shell too, but starts one program there."""
    log = server.run(command(), SLURM_JOB_ID=7, SLURM_NTASKS=2, SLURM_PROCID=0, SLURM_LOCALID=0)
    assert "complete, 29 images" in log
    assert files(tmp_path / "cache") == expected_files


class FakeMessages:
    """Takes the place of messages from rank 0 of three."""

    def __init__(self, planned):
        self.ranks = Ranks(2, 3, 2)
        self._planned = planned

    def receive(self, name, meanwhile=None):
        return self._planned if name == "plan" else True

    def send(self, name, value):
        pass

    def report_progress(self, progress):
        pass

    def raise_if_stopped(self):
        pass


def test_a_shard_that_rank_0_did_not_list_is_written_by_no_rank(monkeypatch, tmp_path):
    """Rank 0 had found shard 4 sealed; a rank that does not see it yet on a network file system leaves it alone."""
    work = [ShardWork(number, [f"{number}.jpg"]) for number in range(5)]
    extracted = []

    def extract(cache, work, *_, **__):
        extracted.extend(shard.number for shard in work)
        return iter(())

    monkeypatch.setattr(run_module, "extract", extract)
    monkeypatch.setattr(run_module, "plan_extraction", lambda inputs, manifest: Plan(0, "digest", work=work))
    for name in ("load_tower", "read_manifest", "require_same", "shard_spec"):
        monkeypatch.setattr(run_module, name, lambda *_, **__: None)
    inputs = SimpleNamespace(config=ExtractConfig("r", "i", "t", tmp_path), images=None)
    run_module._run_other_rank(inputs, FakeMessages({"digest": "digest", "numbers": [0, 1, 2, 3]}))
    assert extracted == [2]
