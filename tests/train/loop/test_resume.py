"""Where a run starts: from a checkpoint, from the beginning, or not at all."""

import json
import shutil

import pytest

from llava_twophase.errors import UserError
from llava_twophase.train.layout import Layout
from llava_twophase.train.loop.checkpoints import FINISHED, MARKER
from llava_twophase.train.loop.resume import RunLength, Start, find_start, restore_config, write_finished
from train.loop.checkpoint_files import IDENTITY, LAYOUT, write

LENGTH = RunLength(max_steps=20, epochs=3.0)


def start(folder, asked=None, identity=IDENTITY, length=LENGTH, layout=LAYOUT):
    return find_start(folder, asked, identity, length, layout)


def resumed(checkpoint, layout=LAYOUT, origin=LAYOUT):
    return Start(checkpoint=checkpoint, layout=layout, origin=origin)


def finish(folder, step=20, steps_per_epoch=10, asked=None):
    (folder / "mm_projector.bin").write_bytes(b"weights")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    write_finished(folder, IDENTITY, step, steps_per_epoch, asked)


def test_run_length_counts_steps_as_hf_trainer():
    assert RunLength(7, 3.0).steps(5) == 7
    assert RunLength(-1, 3.0).steps(5) == 15
    assert RunLength(-1, 0.5).steps(5) == 3


def test_find_start_resumes_from_the_newest_complete_checkpoint(tmp_path):
    write(tmp_path, 9)
    newest = write(tmp_path, 10)
    write(tmp_path, 11, complete=False)
    assert start(tmp_path) == start(tmp_path, "True") == start(tmp_path, "true") == resumed(newest)


def test_find_start_takes_the_checkpoint_that_is_asked_for(tmp_path):
    older = write(tmp_path, 3)
    write(tmp_path, 6)
    assert start(tmp_path, str(older)) == resumed(older)


def test_find_start_begins_without_a_checkpoint(tmp_path):
    assert start(tmp_path / "absent") == start(tmp_path) == start(tmp_path, "False") == Start()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("True", "has no complete checkpoint; use False"),
        ("checkpoint-3", "is not a complete checkpoint: it has no complete.json"),
        ("nowhere", "there is no such folder; expected True, False or one"),
    ],
)
def test_find_start_refuses_a_checkpoint_that_is_not_there(tmp_path, asked, message):
    write(tmp_path, 3, complete=False)
    with pytest.raises(UserError, match=message):
        start(tmp_path, asked if asked == "True" else str(tmp_path / asked))


def test_find_start_refuses_false_beside_a_checkpoint(tmp_path):
    write(tmp_path, 3)
    with pytest.raises(UserError) as caught:
        start(tmp_path, "False")
    assert "has checkpoint-3; remove the flag to resume from it" in str(caught.value)
    assert f"rm -r {tmp_path}" in str(caught.value)


def test_find_start_refuses_other_settings_field_by_field(tmp_path):
    write(tmp_path, 3)
    with pytest.raises(UserError) as caught:
        start(tmp_path, identity={"global_batch_size": 2, "features": {"select_layer": -1}}, layout=Layout(1, 2, 1))
    expected = "global_batch_size: the checkpoint has 8, this run 2 (set --gradient_accumulation_steps 4)"
    assert expected in str(caught.value)
    assert "features.select_layer: the checkpoint has -2, this run -1" in str(caught.value)


def test_find_start_resumes_with_another_layout_and_says_what_is_carried_over(tmp_path, caplog):
    """The first layout stays that of the run's start, however often it changes."""
    origin, here = Layout(4, 2, 1), Layout(1, 4, 2, zero_stage=2)
    checkpoint = write(tmp_path, 3, origin=origin)
    with caplog.at_level("INFO"):
        assert start(tmp_path, layout=here) == resumed(checkpoint, origin=origin)
    assert "written by 2 processes" in caplog.text and "this run has 1 process" in caplog.text
    assert "the optimizer's state" in caplog.text and "carried over" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        start(tmp_path)
    assert "carried over" not in caplog.text


def test_find_start_recognises_a_run_that_was_finished_with_another_layout(tmp_path):
    finish(tmp_path)
    assert start(tmp_path, layout=Layout(8, 1, 1)) == Start(finished=True)


def test_find_start_refuses_a_checkpoint_after_the_last_step(tmp_path):
    write(tmp_path, 10)
    with pytest.raises(UserError, match="after the 5 steps that this command trains"):
        start(tmp_path, length=RunLength(5, 1.0))


def test_find_start_reports_a_damaged_checkpoint_and_offers_the_older_one(tmp_path):
    write(tmp_path, 3)
    older = write(tmp_path, 6)
    (write(tmp_path, 7) / "optimizer.pt").unlink()
    damaged = write(tmp_path, 9)
    (damaged / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(UserError) as caught:
        start(tmp_path)
    message = str(caught.value)
    assert f"{damaged} is damaged: optimizer.pt has 4 bytes" in message
    assert f"--resume_from_checkpoint {older}" in message and f"rm -r {damaged}" in message


@pytest.mark.parametrize("content", ["", "null", "{", None])
def test_find_start_reports_a_damaged_marker_of_the_only_checkpoint(tmp_path, content):
    """Without content, a folder has its name."""
    checkpoint = write(tmp_path, 3)
    if content is None:
        (checkpoint / MARKER).unlink()
        (checkpoint / MARKER).mkdir()
    else:
        (checkpoint / MARKER).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="complete.json is damaged.* there is no older checkpoint"):
        start(tmp_path)


def test_find_start_recognises_a_finished_run_with_and_without_checkpoints(tmp_path):
    finish(tmp_path)
    assert start(tmp_path) == Start(finished=True)
    assert start(tmp_path, length=RunLength(-1, 2.0)) == Start(finished=True)
    write(tmp_path, 20)
    assert start(tmp_path) == start(tmp_path, "True") == Start(finished=True)


def test_find_start_goes_back_once_if_a_checkpoint_is_asked_for(tmp_path):
    older = write(tmp_path, 10)
    finish(tmp_path)
    assert start(tmp_path, str(older)) == resumed(older)
    finish(tmp_path, asked=str(older))
    assert start(tmp_path, str(older)) == start(tmp_path) == Start(finished=True)


def test_find_start_continues_a_finished_run_for_longer(tmp_path):
    finish(tmp_path)
    assert start(tmp_path, length=RunLength(30, 1.0)) == Start()
    newest = write(tmp_path, 20)
    assert start(tmp_path, length=RunLength(30, 1.0)) == resumed(newest)
    assert start(tmp_path, length=RunLength(-1, 2.5)) == resumed(newest)


def test_find_start_refuses_to_shorten_or_change_a_finished_run(tmp_path):
    finish(tmp_path)
    with pytest.raises(UserError, match="a finished run of 20 steps, and this command trains 5"):
        start(tmp_path, length=RunLength(5, 1.0))
    with pytest.raises(UserError, match="global_batch_size: the finished run has 8, this run 1"):
        start(tmp_path, identity={**IDENTITY, "global_batch_size": 1})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "mm_projector.bin is missing"),
        (lambda path: path.write_bytes(b"weight"), "mm_projector.bin has 6 bytes, expected 7"),
        (lambda path: path.write_bytes(b"Weights"), "mm_projector.bin differs from its checksum"),
    ],
)
def test_find_start_writes_a_damaged_projector_again_from_the_last_checkpoint(tmp_path, caplog, damage, problem):
    finish(tmp_path)
    newest = write(tmp_path, 20)
    damage(tmp_path / "mm_projector.bin")
    assert start(tmp_path) == resumed(newest)
    assert f"{problem}; it is written again from the last checkpoint" in caplog.text
    shutil.rmtree(newest)
    with pytest.raises(UserError, match=f"{problem}; there is no checkpoint .* after: rm .*finished.json"):
        start(tmp_path)
    (tmp_path / FINISHED).unlink()
    assert start(tmp_path) == Start()


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_find_start_has_a_damaged_config_written_again_without_training(tmp_path, caplog, damage, checkpoint):
    finish(tmp_path)
    if checkpoint:
        write(tmp_path, 20)
    damage(tmp_path / "config.json")
    assert start(tmp_path) == Start(finished=True, config_is_damaged=True)
    assert "is damaged: config.json" in caplog.text
    restore_config(tmp_path, {"mm_hidden_size": 1024})
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == {"mm_hidden_size": 1024}
    assert start(tmp_path) == Start(finished=True)


def test_find_start_treats_config_and_projector_alike_if_both_are_damaged(tmp_path):
    finish(tmp_path)
    newest = write(tmp_path, 20)
    for name in ("config.json", "mm_projector.bin"):
        (tmp_path / name).unlink()
    assert start(tmp_path) == resumed(newest)


@pytest.mark.parametrize("content", ["", "null", '{"step": 20}', None])
def test_find_start_repeats_the_end_of_a_run_whose_record_is_damaged(tmp_path, caplog, content):
    finish(tmp_path)
    newest = write(tmp_path, 20)
    record = tmp_path / FINISHED
    changed = record.read_text(encoding="utf-8").replace('"step": 20', '"step": 30')
    record.write_text(changed if content is None else content, encoding="utf-8")
    assert start(tmp_path) == resumed(newest)
    assert "finished.json" in caplog.text and "the artefacts are written again" in caplog.text
