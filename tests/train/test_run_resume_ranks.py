"""A run that resumes on another number of ranks, or with another engine, equals an uninterrupted one within rounding.

Eleven records and a global batch of four: each epoch ends with a step of three samples, which two ranks must fill up.
"""

import pytest
import torch

import drawn
from commands import checkpoint_command, deepspeed, outcome, torchrun
from helpers import free_port, needs_compiler, run
from llava_twophase.train.cli import main
from llava_twophase.train.compat import read_zero_checkpoint
from llava_twophase.train.layout import Layout
from llava_twophase.train.loop.checkpoints import checkpoint_problems, complete_checkpoints, read_record

EVERY_STEP = {
    "save_steps": 1,
    "save_total_limit": 0,
    "logging_steps": 1,
    "num_train_epochs": 3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.0,  # pipelines/zero2.json does not clip
}


def split(batch_size, accumulation, **flags):
    return {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation, **flags}


@pytest.fixture(scope="module")
def command(plain_set, tiny_llama, tiny_clip, plain_cache, tmp_path_factory):
    """Return the training command of a run over eleven records, without its launcher."""
    root = tmp_path_factory.mktemp("ranks")
    records = drawn.write_records(plain_set.records[:11], root / "records.json")

    def make(name, **flags):
        folder = root / name
        return folder, checkpoint_command(
            records, tiny_llama, tiny_clip, plain_cache, folder, **{**EVERY_STEP, **flags}
        )

    return make


@pytest.fixture(scope="module")
def uninterrupted(command):
    """The folder of a run of one process without DeepSpeed: nine steps, three in each epoch."""
    folder, arguments = command("uninterrupted", **split(2, 2))
    assert main(arguments[1:]) == 0
    return folder


def one_rank():
    """Return the environment of a single rank, as a launcher sets it."""
    return {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}


def assert_equal_within_rounding(folder, expected):
    """Assert equal steps, learning rates, losses and weights."""
    one, other = outcome(folder), outcome(expected)
    assert [(step, rate) for step, _, rate in one.curve] == [(step, rate) for step, _, rate in other.curve]
    assert one.losses == pytest.approx(other.losses, rel=1e-6)
    for name, weights in other.projector.items():
        torch.testing.assert_close(one.projector[name], weights, rtol=1e-6, atol=1e-6)


def resume(launcher, command, name, source, step, **flags):
    """Run a command in a folder of its own from another run's checkpoint; return the folder and what it wrote."""
    environment = flags.pop("environment", {})
    folder, arguments = command(name, resume_from_checkpoint=source / f"checkpoint-{step}", **flags)
    done = run([*launcher, *arguments], **environment)
    assert f"resuming from {source / f'checkpoint-{step}'}; it was written by" in done.stderr + done.stdout
    return folder


@needs_compiler
def test_run_that_changes_ranks_and_engine_equals_an_uninterrupted_one(command, uninterrupted):
    """Each run resumes from a checkpoint of the one before, and ends with the weights of the uninterrupted run."""
    zero2, zero3 = "pipelines/zero2.json", "pipelines/zero3.json"
    folder, folders = uninterrupted, []
    for step, (name, launcher, flags) in enumerate(
        [
            ("zero2-2-ranks", deepspeed(2), split(2, 1, deepspeed=zero2)),
            ("zero2-1-rank", ["python"], split(4, 1, deepspeed=zero2, environment=one_rank())),
            ("zero3-2-ranks", deepspeed(2), split(1, 2, deepspeed=zero3)),
            ("ddp-2-ranks", torchrun(2), split(2, 1)),
        ],
        start=2,
    ):
        folder = resume(launcher, command, name, folder, step, **flags)
        folders.append(folder)
    last, arguments = command("plain", resume_from_checkpoint=folder / "checkpoint-6", **split(4, 1))
    assert main(arguments[1:]) == 0
    for changed in [*folders, last]:
        assert_equal_within_rounding(changed, uninterrupted)
        for checkpoint in complete_checkpoints(changed):
            assert checkpoint_problems(checkpoint) == []
            assert read_record(checkpoint).origin == Layout(1, 2, 2)
    assert read_record(folders[2] / "checkpoint-9").layout == Layout(2, 1, 2, 3)


@needs_compiler
def test_float32_master_weights_are_carried_over_exactly(command):
    """In bf16; a step changes weights by about the learning rate, and rounding to bf16 would undo three of them."""
    tiny_rate = {"bf16": True, "learning_rate": 1e-6, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    flags = split(2, 2, max_steps=4, **tiny_rate)
    first, arguments = command("bf16", deepspeed="pipelines/zero2.json", **flags)
    run(["python", *arguments], **one_rank())
    flags |= {"deepspeed": "pipelines/zero3.json", "environment": one_rank()}
    other = resume(["python"], command, "bf16-zero3", first, 3, **flags)
    states = {}
    for name, checkpoint in {"before": first / "checkpoint-3", "after": other / "checkpoint-4"}.items():
        step = checkpoint.name.partition("-")[2]
        states[name], count = read_zero_checkpoint(checkpoint / f"global_step{step}", other / "work" / name)
        assert count == int(step)
    for name, state in states["before"].items():
        before, after = state["fp32"].flatten(), states["after"][name]["fp32"].flatten()
        rounded = before.bfloat16().float()
        assert (after - before).abs().max() < 1.5e-6 < (after - rounded).abs().max()


def test_another_split_of_the_batch_on_one_process_equals_an_uninterrupted_run(command, uninterrupted, caplog):
    folder, arguments = command("split", resume_from_checkpoint=uninterrupted / "checkpoint-4", **split(4, 1))
    with caplog.at_level("INFO"):
        assert main(arguments[1:]) == 0
    assert "this run has 1 process x 4 samples x 1 accumulation step" in caplog.text
    assert_equal_within_rounding(folder, uninterrupted)


def test_another_global_batch_is_refused_with_the_number_to_set(command, uninterrupted, capsys):
    for flags, expected in {(1, 1): "4", (2, 4): "2"}.items():
        _, arguments = command("refused", resume_from_checkpoint=uninterrupted / "checkpoint-4", **split(*flags))
        assert main(arguments[1:]) == 1
        assert f"(set --gradient_accumulation_steps {expected})" in capsys.readouterr().err
