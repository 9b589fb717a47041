"""Parsing: every problem of a command line in one message."""

import re
from base64 import urlsafe_b64encode

import pytest

from llava_twophase.command_line import UsageError
from llava_twophase.errors import UserError
from llava_twophase.train.command_line import _json_problems, parse_arguments, parse_command
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
    with pytest.raises(UserError) as caught:
        parse_arguments(recipe(tmp_path / "out", "--fp16", "True", "--version", "v1"))
    assert "fp16 and bf16" in str(caught.value) and "--version v1" in str(caught.value)
    assert not isinstance(caught.value, UsageError)


@pytest.mark.parametrize(
    ("flag", "value", "problem"),
    [
        ("deepspeed", "nope.json", "No such file or directory; expected a JSON object, or a file of one such as"),
        ("deepspeed", "nope", "No such file or directory; expected a JSON object, or a file"),
        ("deepspeed", "bad.json", "it is not valid JSON: Expecting .*; expected a JSON object, or a file"),
        ("deepspeed", "list.json", "found a list; expected a JSON object, or a file of one such as pipelines/zero2"),
        ("deepspeed", "{a", "it is not valid JSON"),
        ("accelerator_config", "nope.json", "No such file or directory"),
        ("lr_scheduler_kwargs", "nope.json", "it is not valid JSON: .*; expected a JSON object$"),
        ("gradient_checkpointing_kwargs", "True", "it is not valid JSON"),
    ],
)
def test_parse_arguments_names_the_flag_whose_json_cannot_be_read(flag, value, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    parsed = parse_command(recipe(tmp_path / "out", f"--{flag}", value))
    (found,) = parsed.flag_problems
    assert re.match(rf"--{flag} {re.escape(value)}: {problem}", found) and parsed.faulty == {flag}


def test_json_problems_accepts_the_base64_form_of_a_deepspeed_configuration():
    assert _json_problems({"deepspeed": urlsafe_b64encode(b'{"zero_optimization": {"stage": 2}}').decode()}) == {}


def test_parse_command_marks_flags_whose_value_is_unknown(tmp_path):
    parsed = parse_command(recipe(tmp_path / "out", "--max_steps", "ten"))
    assert parsed.faulty == {"max_steps"}
    assert parsed.arguments.training.max_steps == -1
