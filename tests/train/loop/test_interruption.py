"""SIGTERM and SIGUSR1: a complete checkpoint, no artefact, and a rerun that resumes."""

import os
import signal
from datetime import timedelta

import pytest
import torch.distributed as dist
from transformers import TrainingArguments

from commands import assert_same_outcome, outcome, torchrun, train_command
from helpers import run
from llava_twophase.train.loop import interruption
from llava_twophase.train.loop.checkpoints import checkpoint_problems, complete_checkpoints
from llava_twophase.train.loop.interruption import StopOnSignal
from llava_twophase.train.loop.trainer import ProjectorTrainer


@pytest.fixture
def interrupt(monkeypatch):
    """Send this process a signal in the step with this number."""

    def at(step, number):
        training_step = ProjectorTrainer.training_step

        def interrupted(self, *args, **kwargs):
            if self.state.global_step == step:
                os.kill(os.getpid(), number)
            return training_step(self, *args, **kwargs)

        monkeypatch.setattr(ProjectorTrainer, "training_step", interrupted)

    return at


@pytest.mark.parametrize(
    ("number", "code", "step", "flags"),
    [
        (signal.SIGTERM, 143, 2, {"enable_jit_checkpoint": True}),
        (signal.SIGTERM, 143, 5, {"save_strategy": "epoch"}),
        (signal.SIGUSR1, 138, 3, {"save_strategy": "no"}),
    ],
)
def test_signal_writes_a_complete_checkpoint_and_the_rerun_resumes(
    train_in_process, interrupt, monkeypatch, number, code, step, flags
):
    """Three steps an epoch: within the first one, at the end of the second one, and after its start."""
    flags = {"num_train_epochs": 3, **flags}
    handler = signal.getsignal(number)
    interrupt(step, number)
    assert train_in_process(**flags) == (code, True)
    monkeypatch.undo()
    folder = train_in_process.folder / "out"
    newest = complete_checkpoints(folder)[-1]
    assert newest.name == f"checkpoint-{step + 1}" and checkpoint_problems(newest) == []
    assert not (folder / "mm_projector.bin").exists() and not (folder / "finished.json").exists()
    assert signal.getsignal(number) == handler
    assert train_in_process(**flags)[0] == 0
    assert train_in_process("uninterrupted", **flags)[0] == 0
    resumed, uninterrupted = outcome(folder), outcome(train_in_process.folder / "uninterrupted")
    assert resumed.curve[-1] == uninterrupted.curve[-1]
    assert_same_outcome(resumed._replace(curve=[]), uninterrupted._replace(curve=[]))


def test_signal_in_the_last_step_finishes_the_run(train_in_process, interrupt):
    interrupt(3, signal.SIGTERM)
    assert train_in_process(max_steps=4) == (0, True)
    assert (train_in_process.folder / "out" / "finished.json").is_file()


def test_stop_on_signal_lets_all_groups_wait_as_long_as_ddp_timeout(monkeypatch):
    timeouts = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda backend: timeouts.append(backend))
    monkeypatch.setattr(interruption, "set_group_timeouts", timeouts.append)
    stopper, arguments = StopOnSignal(), TrainingArguments(ddp_timeout=7, use_cpu=True, report_to="none")
    stopper.on_train_begin(arguments, None, None)
    stopper.on_train_end(arguments, None, None)
    assert timeouts == ["gloo", timedelta(seconds=7)]  # its own group too, which exists by then


INTERRUPTED = """\
import os, signal, sys
from llava_twophase.train.loop.trainer import ProjectorTrainer
from llava_twophase.train.cli import main

step = ProjectorTrainer.training_step

def interrupted(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == 1 and "STOP" in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *args, **kwargs)

ProjectorTrainer.training_step = interrupted
sys.exit(main())
"""


def test_signal_on_one_rank_stops_all_and_the_finished_rerun_changes_no_file(
    plain_set, tiny_llama, tiny_clip, plain_cache, tmp_path
):
    script, folder = tmp_path / "interrupted.py", tmp_path / "out"
    script.write_text(INTERRUPTED, encoding="utf-8")
    _, *flags = train_command(
        data_path=plain_set.json,
        model_name_or_path=tiny_llama,
        vision_tower=tiny_clip,
        feature_cache=plain_cache,
        output_dir=folder,
        max_steps=4,
        per_device_train_batch_size=2,
    )
    stopped = run([*torchrun(), script, *flags], expect=None, STOP=1)
    assert stopped.returncode != 0 and "received SIGTERM" in stopped.stderr
    assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-2"]
    assert not (folder / "mm_projector.bin").exists()
    resumed = run([*torchrun(), script, *flags]).stderr
    assert "resuming from" in resumed
    for noise in ("Setting accelerator to CPU", "find_unused_parameters"):
        assert noise not in stopped.stderr + resumed
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "is finished" in run([*torchrun(), script, *flags]).stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
