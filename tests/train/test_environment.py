"""Packages, launcher and folder, checked before anything is loaded."""

import pytest

from llava_twophase.errors import UserError
from llava_twophase.train import environment
from llava_twophase.train.command_line import parse_arguments
from train.recipe import recipe


@pytest.fixture
def parse(tmp_path):
    return lambda *flags: parse_arguments(recipe(tmp_path / "out", *flags))


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("mlflow", "--report_to mlflow is not installed: pip install mlflow, or use --report_to none"),
        ("nothing", "nothing is not supported"),
    ],
)
def test_require_trackers_refuses_absent_and_unknown_ones(parse, tracker, message):
    arguments = parse()
    arguments.training.report_to = [tracker]
    with pytest.raises(UserError, match=message):
        environment.require_trackers(arguments)


def test_require_output_refuses_a_file(parse, tmp_path):
    arguments = parse()
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    with pytest.raises(UserError, match="--output_dir .* cannot be created"):
        environment.require_output(arguments)


def test_require_output_refuses_a_url(parse):
    arguments = parse()
    arguments.training.output_dir = "s3://bucket/run"
    with pytest.raises(UserError, match="--output_dir s3://bucket/run: it must be a folder on this machine"):
        environment.require_output(arguments)


def test_require_output_refuses_a_folder_in_the_place_of_a_file(parse, tmp_path):
    """It would be found only when the run is over and writes its artefacts."""
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    environment.require_output(parse())
    (tmp_path / "out" / "config.json").mkdir()
    with pytest.raises(UserError, match=r"has a folder config.json, expected a file: rm -r .*config.json"):
        environment.require_output(parse())


def test_require_space_counts_checkpoints(parse):
    with pytest.raises(UserError, match="are needed for 2 checkpoints, but"):
        environment.require_space(parse(), 10**15)
