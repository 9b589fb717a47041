"""A killed rank, a killed node, a lost network and a full disk: a message that says what to do, and a rerun."""

import time

import pytest

from cluster.hosts import wait_for
from cluster.runs import assert_same_projector, submit_training

pytestmark = pytest.mark.cluster

LOST = "lost contact with another rank"
RERUN = "Run the same command again: it resumes"


def test_killed_rank_and_a_network_that_returns(idle_slurm, inputs, uninterrupted, tmp_path):
    """The killed rank ends the job. Its rerun survives a network failure that is shorter than the timeout."""
    job = submit_training(idle_slurm, inputs, tmp_path / "out")
    wait_for_checkpoint(job, tmp_path / "out")
    assert idle_slurm.hosts.kill("node2", "[p]ython -u pipelines/train_projector.py") == 1
    log = job.wait("FAILED")
    assert "Signal 9 (SIGKILL)" in log and LOST in log and RERUN in log
    job = submit_training(idle_slurm, inputs, tmp_path / "out")
    job.wait_for_progress()
    idle_slurm.hosts.unplug("node2")
    time.sleep(4)  # the length of the failure
    idle_slurm.hosts.plug_in("node2")
    log = job.wait()
    assert "resuming from" in log and LOST not in log
    assert_same_projector(tmp_path / "out", uninterrupted.folder)


def test_lost_network_and_a_killed_node(idle_slurm, inputs, uninterrupted, tmp_path):
    """A failure that is longer than the timeout ends the job. Its rerun is requeued when a node dies."""
    job = submit_training(idle_slurm, inputs, tmp_path / "out", TIMEOUT=15)
    wait_for_checkpoint(job, tmp_path / "out")
    idle_slurm.hosts.unplug("node2")
    job.wait_for_log(LOST)
    idle_slurm.hosts.plug_in("node2")
    # SLURM requeues the job itself if the node was away for SlurmdTimeout.
    wait_for(lambda: job.restarts or job.state == "FAILED", job.describe)
    assert "the network was down for 15 s (--ddp_timeout)" in job.log() and RERUN in job.log()
    idle_slurm.wait_for_nodes()
    job = submit_training(idle_slurm, inputs, tmp_path / "out") if job.state == "FAILED" else job
    restarts = job.restarts
    job.wait_for_progress()
    idle_slurm.hosts.power_off("node2")
    job.wait_for_restart(restarts + 1)
    idle_slurm.restore_nodes()
    assert "resuming from" in job.wait()
    assert_same_projector(tmp_path / "out", uninterrupted.folder)


def test_full_shared_disk(idle_slurm, inputs, uninterrupted):
    """Rank 0 cannot write a checkpoint; the other node ends too."""
    hosts = idle_slurm.hosts
    output, ballast = hosts.small_disk / "out", hosts.small_disk / "ballast"
    job = submit_training(idle_slurm, inputs, output)
    job.wait_for_progress()
    hosts.run("login", f"cat /dev/zero >{ballast}", expect=1)
    log = job.wait("FAILED")
    assert "is full" in log
    hosts.run("login", f"rm {ballast}")
    submit_training(idle_slurm, inputs, output).wait()
    assert_same_projector(hosts.seen_from_here(output), uninterrupted.folder)


def wait_for_checkpoint(job, folder):
    wait_for(lambda: list(folder.glob("checkpoint-*/complete.json")), lambda: f"a checkpoint: {job.describe()}")
