"""Checkpoints on disk: markers, verification, and which are kept."""

import errno
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

import tiny
from helpers import run
from llava_twophase.errors import UserError
from llava_twophase.train.loop.checkpoints import (
    MARKER,
    CheckpointKeeper,
    checkpoint_problems,
    complete_checkpoints,
    explain_disk_errors,
    read_record,
    saved_micro_batching,
)
from llava_twophase.train.loop.checksums import write_checked_json
from llava_twophase.train.model.activation_memory import ActivationMemory
from llava_twophase.train.model.micro_batches import MicroBatching
from train.loop.checkpoint_files import IDENTITY, LAYOUT, write


def test_complete_checkpoints_are_listed_by_number_without_incomplete_ones(tmp_path):
    write(tmp_path, 9)
    write(tmp_path, 10)
    write(tmp_path, 11, complete=False)
    (tmp_path / "checkpoint-final").mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [12, 15]),
        (1, None, [15]),
        (2, 6, [6, 15]),
        (1, 6, [6, 15]),
        (3, 15, [9, 12, 15]),
        (0, 6, [6, 9, 12, 15]),
    ],
)
def test_on_save_keeps_the_newest_and_the_best(tmp_path, keep, best, left):
    for step in (6, 9, 12):
        write(tmp_path, step)
    write(tmp_path, 15, complete=False)
    state = TrainerState(global_step=15, best_model_checkpoint=best and f"{tmp_path}/checkpoint-{best}")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    CheckpointKeeper(IDENTITY, keep, LAYOUT).on_save(arguments, state, TrainerControl())
    assert [path.name for path in complete_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_on_save_records_identity_and_checksums_of_all_files(tmp_path):
    checkpoint = write(tmp_path, 3, complete=False)
    (checkpoint / "global_step3").mkdir()
    (checkpoint / "global_step3" / "rank_0.pt").write_bytes(b"optimizer")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    CheckpointKeeper(IDENTITY, None, LAYOUT).on_save(arguments, TrainerState(global_step=3), TrainerControl())
    record = read_record(checkpoint)
    assert (record.identity, record.layout, record.origin) == (IDENTITY, LAYOUT, LAYOUT)
    on_disk = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert set(record.files) == on_disk - {MARKER}
    assert checkpoint_problems(checkpoint) == []


def test_on_save_replaces_a_marker_that_is_a_folder(tmp_path):
    checkpoint = write(tmp_path, 3, complete=False)
    (checkpoint / MARKER).mkdir()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    CheckpointKeeper(IDENTITY, None, LAYOUT).on_save(arguments, TrainerState(global_step=3), TrainerControl())
    assert checkpoint_problems(checkpoint) == []


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_a_digit(path):
    content = path.read_text()
    assert '"steps_per_epoch": 10' in content
    path.write_text(content.replace('"steps_per_epoch": 10', '"steps_per_epoch": 30'))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: flip_a_bit(folder / "model.safetensors"), "model.safetensors differs from its checksum"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"half"), "optimizer.pt has 4 bytes, expected 22"),
        (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda folder: (folder / MARKER).write_text(""), "complete.json is damaged"),
        (lambda folder: (folder / MARKER).write_text("[]"), "complete.json is damaged"),
        (lambda folder: change_a_digit(folder / MARKER), "complete.json differs from its checksum"),
        (lambda folder: write_checked_json(folder / MARKER, {"step": 3}), "complete.json was written by another"),
        (lambda folder: (folder / MARKER).write_text('{"world_size": 1}'), "written by an earlier version"),
    ],
)
def test_checkpoint_problems_names_the_damaged_file(tmp_path, damage, problem):
    checkpoint = write(tmp_path, 3)
    assert checkpoint_problems(checkpoint) == []
    damage(checkpoint)
    (found,) = checkpoint_problems(checkpoint)
    assert problem in found


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full: free some space, then run .* from checkpoint-6"),
        (
            OSError(errno.EROFS, "Read-only file system", "out/checkpoint-9"),
            "make it writable .* from checkpoint-6",
        ),
        (OSError(errno.EROFS, "Read-only file system", "outside/x"), None),
        (ConnectionResetError(errno.ECONNRESET, "reset"), None),
        (RuntimeError("a bug"), None),
    ],
)
def test_explain_disk_errors_says_what_to_do_and_passes_other_errors(tmp_path, monkeypatch, error, said):
    monkeypatch.chdir(tmp_path)
    write(Path("out"), 6)
    with pytest.raises(Exception) as caught, explain_disk_errors(Path("out")):
        raise error
    if said is None:
        assert caught.value is error
    else:
        assert isinstance(caught.value, UserError)
        assert re.search(said, str(caught.value))


def test_checkpoint_of_a_13b_run_holds_the_projector_and_nothing_frozen(plain_set, tmp_path):
    """mlp2x_gelu from 1024 to 5120: weights and two moments in float32, 0.38 GB beside an LLM of 26 GB."""
    tower, llm, output = tmp_path / "tower", tmp_path / "llm", tmp_path / "out"
    for folder in (tower, llm):
        folder.mkdir()
    tiny.write_clip(tower, hidden_size=1024, num_attention_heads=16, num_hidden_layers=2)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    tiny.write_llama(llm, plain_set.captions, hidden_size=5120, intermediate_size=16, num_hidden_layers=1, **heads)
    flags = ["--model_name_or_path", llm, "--vision_tower", tower, "--mm_projector_type", "mlp2x_gelu"]
    flags += ["--data_path", plain_set.json, "--image_folder", plain_set.folder, "--tune_mm_mlp_adapter", "True"]
    flags += ["--max_steps", "1", "--save_steps", "1", "--per_device_train_batch_size", "1", "--bf16", "True"]
    run(["python", "pipelines/train_projector.py", *flags, "--output_dir", output, "--report_to", "none"])
    weights = 1024 * 5120 + 5120 + 5120 * 5120 + 5120
    size = sum(path.stat().st_size for path in (output / "checkpoint-1").rglob("*"))
    assert 12 * weights < size < 12 * weights + 100_000
    assert (output / "mm_projector.bin").stat().st_size < 4 * weights + 100_000


def test_saved_micro_batching_is_what_the_run_used(tmp_path):
    assert saved_micro_batching(tmp_path) is None
    memory = ActivationMemory(layers=2, image_tokens=16, layer=100, attention=0, boundary=10, head=50)
    choice = MicroBatching(4, checkpoint_every=2, limit=10**6, memory=memory)
    (tmp_path / "micro_batching.json").write_text(json.dumps(asdict(choice)), encoding="utf-8")
    assert saved_micro_batching(tmp_path) == choice
