"""Which checkpoints are whole, which are kept, and which runs may go on from them."""

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
    checkpoint_to_resume,
    explain_disk_errors,
    saved_micro_batching,
    whole_checkpoints,
)
from llava_twophase.train.model.micro_batches import MicroBatching

IDENTITY = {"world_size": 2, "features": {"select_layer": -2}}


def write(folder, step, identity=IDENTITY, whole=True):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"x")
    if whole:
        (checkpoint / MARKER).write_text(json.dumps(identity), encoding="utf-8")
    return checkpoint


def test_the_newest_whole_one_is_resumed_by_number_not_by_name(tmp_path):
    write(tmp_path, 9)
    newest = write(tmp_path, 10)
    write(tmp_path, 11, whole=False)
    (tmp_path / "checkpoint-final").mkdir()
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert checkpoint_to_resume(tmp_path, None, IDENTITY) == newest


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
def test_the_newest_and_the_best_stay(tmp_path, keep, best, left):
    for step in (6, 9, 12):
        write(tmp_path, step)
    write(tmp_path, 15, whole=False)
    state = TrainerState(global_step=15, best_model_checkpoint=best and f"{tmp_path}/checkpoint-{best}")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    CheckpointKeeper(IDENTITY, keep).on_save(arguments, state, TrainerControl())
    assert [path.name for path in whole_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


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
def test_errors_of_the_disk_say_what_to_do_and_others_pass(tmp_path, monkeypatch, error, said):
    monkeypatch.chdir(tmp_path)
    write(Path("out"), 6)
    with pytest.raises(Exception) as caught, explain_disk_errors(Path("out")):
        raise error
    if said is None:
        assert caught.value is error
    else:
        assert isinstance(caught.value, UserError)
        assert re.search(said, str(caught.value))


def test_nothing_to_resume(tmp_path):
    assert checkpoint_to_resume(tmp_path / "absent", None, IDENTITY) is None
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint_to_resume(tmp_path, "True", IDENTITY)
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint_to_resume(tmp_path, str(write(tmp_path, 3, whole=False)), IDENTITY)


def test_a_folder_that_is_asked_for_is_taken(tmp_path):
    older = write(tmp_path, 3)
    write(tmp_path, 6)
    assert checkpoint_to_resume(tmp_path, str(older), IDENTITY) == older


def test_another_run_is_refused_field_by_field(tmp_path):
    write(tmp_path, 3)
    other = {"world_size": 1, "features": {"select_layer": -1}}
    with pytest.raises(UserError) as caught:
        checkpoint_to_resume(tmp_path, None, other)
    assert "world_size: the checkpoint has 2, this run 1" in str(caught.value)
    assert "features.select_layer: the checkpoint has -2, this run -1" in str(caught.value)


def test_the_13bs_checkpoint_holds_its_projector_and_nothing_frozen(plain_set, tmp_path):
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
    choice = MicroBatching(4, checkpoint_every=2)
    (tmp_path / "micro_batching.json").write_text(json.dumps(asdict(choice)), encoding="utf-8")
    assert saved_micro_batching(tmp_path) == choice


def test_saved_micro_batching_refuses_an_earlier_versions_checkpoint(tmp_path):
    (tmp_path / "cut.json").write_text('{"rows": 4, "recompute": 0}', encoding="utf-8")
    with pytest.raises(UserError, match="was written by an earlier version"):
        saved_micro_batching(tmp_path)
