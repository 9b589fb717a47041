"""Parsing: every problem of a command line in one message."""

import pytest

from llava_twophase.command_line import UsageError
from llava_twophase.errors import UserError
from llava_twophase.train.command_line import parse_arguments, parse_command
from train.recipe import recipe


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--lr", "1e-3"], "--lr is not a flag; did you mean --learning_rate?"),
        (["--learning_rat", "1e-3"], "--learning_rat is not a flag; did you mean --learning_rate?"),
        (["--feature-cach=c"], "--feature-cach is not a flag; did you mean --feature_cache?"),
        (["--zzzzzzzz", "1"], "--zzzzzzzz is not a flag"),
        (["--max_steps", "ten"], "--max_steps ten: expected a whole number"),
        (["--learning_rate", "fast"], "--learning_rate fast: expected a number"),
        (["--bf16", "maybe"], "--bf16 maybe: expected True or False"),
        (["--save_strategy", "sometimes"], "--save_strategy sometimes: expected one of no, steps, epoch"),
        (["--max_steps"], "--max_steps: expected one argument"),
    ],
)
def test_parse_arguments_reports_what_was_found_and_expected(tmp_path, flags, problem):
    with pytest.raises(UsageError) as caught:
        parse_arguments(recipe(tmp_path / "out", *flags))
    message, _, usage = str(caught.value).rpartition("\n")
    assert message.startswith(problem)
    assert usage.startswith("usage: llava-train-projector ")


def test_parse_arguments_requires_output_dir(tmp_path):
    flags = recipe(tmp_path / "out")
    position = flags.index("--output_dir")
    with pytest.raises(UsageError, match="--output_dir is required"):
        parse_arguments(flags[:position] + flags[position + 2 :])


def test_parse_arguments_reports_all_missing_flags():
    with pytest.raises(UsageError) as caught:
        parse_arguments(["--tune_mm_mlp_adapter", "True"])
    for flag in ("--model_name_or_path", "--data_path", "--vision_tower", "--output_dir"):
        assert f"{flag} is required" in str(caught.value)


def test_parse_arguments_reports_usage_and_refused_flags_together(tmp_path):
    flags = ["--lr", "1", "--max_steps", "ten", "--lora_enable", "True", "--bits", "3", "--version", "v1"]
    with pytest.raises(UsageError) as caught:
        parse_arguments(recipe(tmp_path / "out", *flags))
    assert "5 problems were found" in str(caught.value)
    for named in ("--lr ", "--max_steps ten", "--lora_enable True", "--bits 3", "--version v1"):
        assert named in str(caught.value)


def test_an_error_of_training_arguments_is_reported_beside_others(tmp_path):
    deepspeed = tmp_path / "zero.json"
    deepspeed.write_text("{", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parse_arguments(recipe(tmp_path / "out", "--deepspeed", deepspeed, "--version", "v1"))
    assert "is not valid JSON" in str(caught.value) and "--version v1" in str(caught.value)
    assert not isinstance(caught.value, UsageError)


def test_parse_command_marks_flags_whose_value_is_unknown(tmp_path):
    parsed = parse_command(recipe(tmp_path / "out", "--max_steps", "ten"))
    assert parsed.faulty == {"max_steps"}
    assert parsed.arguments.training.max_steps == -1
