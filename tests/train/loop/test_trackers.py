"""Trackers: found unusable before the LLM loads, and one tracker run for a training run."""

import json

import pytest

from llava_twophase.errors import UserError
from llava_twophase.train.command_line import parse_arguments
from llava_twophase.train.loop import trackers
from llava_twophase.train.loop.trackers import FILE, start_trackers
from train.recipe import recipe


@pytest.fixture
def training(tmp_path, monkeypatch):
    def parse(tracker):
        arguments = parse_arguments(recipe(tmp_path, "--report_to", tracker)).for_trainer()
        return arguments

    for name in ("WANDB_RUN_ID", "WANDB_API_KEY", "MLFLOW_RUN_ID", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.delenv(name, raising=False)
    return parse


class FakeWandb:
    """Notes the arguments of `init`; a mock, since a real run takes seconds."""

    def __init__(self, error=None):
        self.error, self.runs = error, []

    def init(self, **options):
        if self.error is not None:
            raise self.error
        self.runs.append(options)


def test_start_trackers_continues_the_wandb_run(training, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    for _ in range(2):
        start_trackers(training("wandb"), tmp_path)
    first, second = fake.runs
    assert first["id"] == second["id"] and first["resume"] == second["resume"] == "allow"
    (tmp_path / "other").mkdir()
    start_trackers(training("wandb"), tmp_path / "other")
    assert fake.runs[2]["id"] != first["id"]


def test_start_trackers_uses_the_wandb_run_of_the_environment(training, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    start_trackers(training("wandb"), tmp_path)
    assert fake.runs[0]["id"] == "mine"


def test_start_trackers_reports_a_missing_login(training, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", FakeWandb(RuntimeError("No API key\nconfigured")))
    with pytest.raises(UserError, match="--report_to wandb: No API key configured; .* WANDB_MODE=offline"):
        start_trackers(training("wandb"), tmp_path)


def test_start_trackers_gives_tensorboard_one_folder(training, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "removed by the next line and restored at the end")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    start_trackers(training("tensorboard"), tmp_path)
    assert trackers.os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "runs")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")


def test_start_trackers_refuses_a_tensorboard_folder_that_cannot_be_made(training, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "runs"))
    with pytest.raises(UserError, match="TENSORBOARD_LOGGING_DIR .*runs cannot be written: Not a directory"):
        start_trackers(training("tensorboard"), tmp_path)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "s3://bucket/runs")
    start_trackers(training("tensorboard"), tmp_path)


def test_start_trackers_continues_the_mlflow_run(training, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.os, "environ", {})
    (tmp_path / FILE).write_text(json.dumps({"mlflow": "abc"}), encoding="utf-8")
    arguments = training("none")
    arguments.report_to = ["mlflow"]
    (callback,) = start_trackers(arguments, tmp_path)
    assert trackers.os.environ["MLFLOW_RUN_ID"] == "abc"
    assert type(callback).__name__ == "_StoreMlflowRun"


def test_wandb_without_login_ends_the_run_before_the_llm_loads(train_in_process, monkeypatch, capsys, tmp_path):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert train_in_process(report_to="wandb", max_steps=1) == (1, False)
    error = capsys.readouterr().err
    assert "--report_to wandb" in error and "WANDB_MODE=offline" in error and "Traceback" not in error
