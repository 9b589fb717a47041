"""A run that is killed at random moments and started again equals an uninterrupted run, bit for bit.

Each test kills the run once; LLAVA_TWOPHASE_KILLS sets the number.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from commands import assert_same_outcome, checkpoint_command, deepspeed, outcome
from helpers import ROOT, needs_compiler, process_environment, run
from llava_twophase.train.cli import main
from llava_twophase.train.loop.checkpoints import complete_checkpoints

KILLS = int(os.environ.get("LLAVA_TWOPHASE_KILLS", "1"))


@pytest.fixture
def train(capsys):
    """Run a training command in this process, which starts faster than another one; return its stderr."""

    def start(command, expect=0):
        capsys.readouterr()
        code = main([str(part) for part in command[1:]])
        message = capsys.readouterr().err
        assert code == expect, message
        return message

    return start


def kill_at(full_command, loss_lines):
    """Start a command and kill its process group after a number of logged losses; return whether it was killed."""
    process = subprocess.Popen(
        [str(part) for part in full_command],
        cwd=ROOT,
        env=process_environment(PYTHONUNBUFFERED="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    seen, text = 0, b""
    watchdog = threading.Timer(240, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    for chunk in iter(lambda: os.read(process.stdout.fileno(), 4096), b""):
        text += chunk
        seen += chunk.count(b": loss ")
        if seen >= loss_lines:
            break
    watchdog.cancel()
    killed = process.poll() is None
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    assert process.wait() in (0, -signal.SIGKILL), text.decode("utf-8", "replace")[-4000:]
    return killed


def assert_killed_equals_uninterrupted(launcher, make, tmp_path, updates):
    """Compare with a run in `uninterrupted`, which has ended."""
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    draws = random.Random(len(str(make)))
    kills = 0
    # First after the loss of step 10: the run resumes from checkpoint-9, in the middle of the second epoch.
    for losses in [7, *(draws.randint(1, updates // 2) for _ in range(KILLS - 1))]:
        kills += kill_at([*launcher(), *make(killed)], losses)
    assert kills, "no run was killed: the test has shown nothing"
    run([*launcher(), *make(killed)])
    assert_same_outcome(outcome(uninterrupted), outcome(killed))
    assert len(outcome(uninterrupted).curve) >= updates // 2
    # Only the newest checkpoint is left, besides incomplete ones of killed runs.
    assert sum((path / "complete.json").is_file() for path in killed.glob("checkpoint-*")) == 1


def test_killed_run_with_accumulation_equals_an_uninterrupted_one(
    plain_set, tiny_llama, tiny_clip, plain_cache, tmp_path, train
):
    def make(output):
        flags = {"gradient_accumulation_steps": 2, "num_train_epochs": 4}
        return checkpoint_command(plain_set.json, tiny_llama, tiny_clip, plain_cache, output, **flags)

    train(make(tmp_path / "uninterrupted"))
    assert_killed_equals_uninterrupted(lambda: [sys.executable], make, tmp_path, updates=24)


@needs_compiler
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_run_of_two_deepspeed_ranks_equals_an_uninterrupted_one(
    plain_set, tiny_llama, tiny_clip, plain_cache, tmp_path, stage
):
    def make(output):
        flags = {"deepspeed": f"pipelines/zero{stage}.json", "bf16": True, "num_train_epochs": 4}
        return checkpoint_command(plain_set.json, tiny_llama, tiny_clip, plain_cache, output, **flags)

    run([*deepspeed(), *make(tmp_path / "uninterrupted")])
    assert_killed_equals_uninterrupted(deepspeed, make, tmp_path, updates=24)


def test_resume_with_other_settings_is_refused_before_the_llm_loads(train_in_process, caplog, capsys):
    """Another seed would repeat samples; another learning rate would be ignored."""
    train = train_in_process
    assert train(max_steps=4) == (0, True)
    assert train(max_steps=4, learning_rate=5e-4, data_seed=7) == (1, False)
    message = capsys.readouterr().err
    assert "learning_rate: the checkpoint has 0.001, this run 0.0005 (--learning_rate or --mm_" in message
    assert "data_seed: the checkpoint has 42, this run 7 (--data_seed)" in message
    assert train(max_steps=4, per_device_train_batch_size=2) == (1, False)
    message = capsys.readouterr().err
    assert "global_batch_size: the checkpoint has 4, this run 2 (set --gradient_accumulation_steps 2)" in message
    assert train(max_steps=6) == (0, True)
    assert f"resuming from {train.folder / 'out' / 'checkpoint-4'}" in caplog.text
    assert [path.name for path in complete_checkpoints(train.folder / "out")][-1] == "checkpoint-6"


def test_run_resumes_from_an_older_checkpoint(plain_set, tiny_llama, tiny_clip, plain_cache, tmp_path, train):
    """Checkpoints newer than the requested one are ignored until they are written again."""
    output = tmp_path / "out"
    make = checkpoint_command(plain_set.json, tiny_llama, tiny_clip, plain_cache, output, save_total_limit=0)
    train(make)
    expected = outcome(output)
    assert kill_at([sys.executable, *make, "--resume_from_checkpoint", output / "checkpoint-6"], 1)
    assert output / "checkpoint-24" not in complete_checkpoints(output)
    train(make)
    assert_same_outcome(outcome(output), expected)
    assert len(complete_checkpoints(output)) == 8


def test_best_checkpoint_is_kept_and_loaded_at_the_end(plain_set, tiny_llama, tiny_clip, plain_cache, tmp_path, train):
    """The highest loss counts as the best, so the best checkpoint is an early one."""
    output = tmp_path / "out"
    evaluated = {"eval_fraction": 0.25, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 1e-2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    train(checkpoint_command(plain_set.json, tiny_llama, tiny_clip, plain_cache, output, **evaluated, **best))
    kept, newest = complete_checkpoints(output)
    assert json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"] == str(kept)
    weights = load_file(kept / "model.safetensors")
    assert all(torch.equal(outcome(output).projector[f"model.{name}"], tensor) for name, tensor in weights.items())


def test_full_disk_keeps_checkpoints_and_a_rerun_resumes(
    plain_set, tiny_llama, tiny_clip, plain_cache, tmp_path, small_disk, train, caplog
):
    """The free space suffices for the check at the start. torch.save reports the full disk with an error of its own."""
    disk = small_disk("size=820k")
    inputs = plain_set.json, tiny_llama, tiny_clip, plain_cache
    keep_all = {"save_steps": 1, "save_total_limit": 0}
    train(checkpoint_command(*inputs, tmp_path / "uninterrupted", **keep_all))
    message = train(checkpoint_command(*inputs, disk, **keep_all), expect=1)
    assert f"the disk of --output_dir {disk} is full: free some space" in message
    assert "it resumes from checkpoint-" in message and "Traceback" not in message
    subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
    with caplog.at_level("INFO"):
        train(checkpoint_command(*inputs, disk, **keep_all))
    assert "resuming from" in caplog.text
    assert_same_outcome(outcome(disk), outcome(tmp_path / "uninterrupted"))


def test_resume_ignores_an_incomplete_checkpoint(
    plain_set, tiny_llama, tiny_clip, plain_cache, tmp_path, train, caplog
):
    """A crash during saving leaves a folder in which files are missing or truncated."""
    output = tmp_path / "out"
    make = checkpoint_command(
        plain_set.json, tiny_llama, tiny_clip, plain_cache, output, save_total_limit=5, max_steps=9
    )
    train(make)
    expected = outcome(output)
    newest = output / "checkpoint-9"
    (newest / "complete.json").unlink()
    (newest / "optimizer.pt").write_bytes(b"half")
    (output / "finished.json").unlink()
    with caplog.at_level("INFO"):
        train(make)
    assert f"resuming from {output / 'checkpoint-6'}" in caplog.text
    assert_same_outcome(outcome(output), expected)
