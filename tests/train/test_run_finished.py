"""A run that has ended: its command changes no file, and a longer one continues it."""

import json
from pathlib import Path

import pytest

from commands import assert_same_outcome, outcome


def contents(folder):
    """Bytes and modification time of every file."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def train(train_in_process):
    return train_in_process


@pytest.mark.parametrize(
    "flags",
    [
        {"max_steps": 4},
        {"max_steps": 3, "save_strategy": "epoch"},
        {"max_steps": 2, "save_strategy": "no"},
        {"num_train_epochs": 0.5},
        {"num_train_epochs": 1},
        {"num_train_epochs": 1.5, "gradient_accumulation_steps": 2},
    ],
    ids=lambda flags: "-".join(map(str, flags.values())),
)
def test_rerun_of_a_finished_run_changes_no_file_and_loads_no_llm(train, flags, caplog):
    assert train(**flags) == (0, True)
    before = contents(train.folder / "out")
    caplog.clear()
    assert train(**flags) == (0, False)
    assert contents(train.folder / "out") == before
    assert "is finished" in caplog.text


def test_longer_command_continues_a_finished_run(train):
    """Three steps an epoch: from within the second epoch into the fourth; the schedule is constant."""
    constant = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    assert train(max_steps=4, **constant) == (0, True)
    assert train(max_steps=10, **constant) == (0, True)
    assert train("uninterrupted", max_steps=10, **constant) == (0, True)
    assert_same_outcome(outcome(train.folder / "out"), outcome(train.folder / "uninterrupted"))
    assert train(max_steps=10, **constant) == (0, False)
    assert train(max_steps=5, **constant) == (1, False)


def test_run_that_was_killed_before_its_artefacts_writes_them_without_a_step(train):
    """With a checkpoint at the last step, which is within an epoch: HF Trainer would train one more."""
    assert train(max_steps=4) == (0, True)
    expected = outcome(train.folder / "out")
    for name in ("mm_projector.bin", "finished.json", "config.json"):
        (train.folder / "out" / name).unlink()
    assert train(max_steps=4) == (0, True)
    assert_same_outcome(outcome(train.folder / "out"), expected)
    assert not (train.folder / "out" / "checkpoint-5").exists()
    finished = json.loads((train.folder / "out" / "finished.json").read_text(encoding="utf-8"))
    assert (finished["step"], finished["steps_per_epoch"]) == (4, 3)


def test_rerun_writes_a_missing_config_again_and_loads_no_llm(train, caplog):
    """Without a checkpoint: it follows from the LLM's configuration and the flags."""
    assert train(max_steps=2, save_strategy="no") == (0, True)
    before = contents(train.folder / "out")
    config, record = train.folder / "out" / "config.json", Path("finished.json")
    content = config.read_bytes()
    config.unlink()
    assert train(max_steps=2, save_strategy="no") == (0, False)
    assert "is damaged: config.json is missing" in caplog.text
    after = contents(train.folder / "out")
    assert config.read_bytes() == content and after[record][0] == before[record][0]
    unchanged = set(before) - {record, Path("config.json")}
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}


def test_damaged_checkpoint_is_reported_with_the_older_one(train, capsys):
    assert train(max_steps=4) == (0, True)
    newest = train.folder / "out" / "checkpoint-4"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:100])
    (train.folder / "out" / "finished.json").unlink()
    assert train(max_steps=4) == (1, False)
    message = capsys.readouterr().err
    assert f"error: {newest} is damaged: optimizer.pt has 100 bytes" in message
    assert f"--resume_from_checkpoint {train.folder / 'out' / 'checkpoint-2'}" in message
    assert train(max_steps=4, resume_from_checkpoint=train.folder / "out" / "checkpoint-2") == (0, True)


def test_second_run_in_one_folder_is_refused(train, capsys, monkeypatch):
    from llava_twophase.train.loop import output_lock

    monkeypatch.setattr(output_lock, "_PATIENCE_SECONDS", 0)
    (train.folder / "out").mkdir()
    with output_lock.output_lock(train.folder / "out"):
        assert train(max_steps=1) == (1, False)
    assert "another training run is writing to --output_dir" in capsys.readouterr().err
    assert train(max_steps=1) == (0, True)
