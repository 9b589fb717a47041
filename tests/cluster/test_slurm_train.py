"""Phase two under SLURM, with the recipe that users copy: signals, preemption, requeue, and the same weights."""

import re

import pytest

from cluster.runs import assert_same_projector, documented_script, submit_training

pytestmark = pytest.mark.cluster


def times(folder):
    """Return the modification time of every file of a run."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_finished_job_prints_no_error(uninterrupted):
    """torchrun's rendezvous, its store and its exit barrier print such lines if the first node ends too early."""
    log = uninterrupted.log
    assert "wrote" in log and "micro-batches of 2" in log
    assert re.findall(r".*(?:rendezvous|Rendezvous|TCPStore|barrier|Traceback|Error|error:).*", log) == []


def test_signalled_and_preempted_job_is_requeued_and_gives_the_same_projector(
    idle_slurm, inputs, uninterrupted, tmp_path
):
    job = submit_training(idle_slurm, inputs, tmp_path / "out")
    job.wait_for_progress()
    idle_slurm.run(f"scancel --signal=TERM {job.number}")  # the steps, as --signal=TERM@300 in the recipe
    job.wait_for_restart(1)
    job.wait_for_progress()
    idle_slurm.run(f"scancel --batch --signal=TERM {job.number}")  # the script alone, as --signal=B:TERM@300
    job.wait_for_restart(2)
    job.wait_for_progress()
    assert not (tmp_path / "out" / "mm_projector.bin").exists()
    urgent = idle_slurm.submit(write_script(tmp_path), "--partition=high", "--nodes=2", "--exclusive")
    job.wait_for_restart(3)
    urgent.wait()
    log = job.wait()
    assert log.count("resuming from") == 3
    assert log.count("received SIGTERM: writing a checkpoint") == 2 * 3  # both ranks say so
    assert_same_projector(tmp_path / "out", uninterrupted.folder)
    before = times(tmp_path / "out")
    idle_slurm.run(f"scontrol requeue {job.number}")
    job.wait_for_log("is finished", count=1)
    job.wait()
    assert times(tmp_path / "out") == before


def write_script(folder):
    (folder / "urgent.sbatch").write_text("#!/bin/sh\nsrun true\n", encoding="utf-8")
    return folder / "urgent.sbatch"


def test_srun_without_torchrun_gives_the_same_projector(idle_slurm, inputs, uninterrupted, tmp_path):
    gpus = ("--ntasks-per-node=8 --gpus-per-node=8", "--ntasks-per-node=1")
    idle_slurm.run(documented_script("srun --nodes=2", inputs, tmp_path / "out", gpus))
    assert_same_projector(tmp_path / "out", uninterrupted.folder)


def test_cancelled_job_writes_a_checkpoint_and_is_not_requeued(idle_slurm, inputs, tmp_path):
    job = submit_training(idle_slurm, inputs, tmp_path / "out")
    job.wait_for_progress()
    idle_slurm.run(f"scancel {job.number}")
    log = job.wait("CANCELLED")
    assert "writing a checkpoint" in log and "requeueing" not in log and job.restarts == 0
    assert list((tmp_path / "out").glob("checkpoint-*/complete.json"))
