"""Exit codes and messages of the training command."""

from llava_twophase.train.cli import main
from train.recipe import recipe


def test_usage_errors_exit_with_2_and_one_usage_line(tmp_path, capsys):
    assert main(recipe(tmp_path / "out", "--max_steps", "ten")) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "--max_steps ten: expected a whole number" in error
    assert error.count("usage:") == 1 and len(error.splitlines()) < 10


def test_problems_of_parser_flags_and_files_are_in_one_message(tmp_path, capsys):
    flags = ["--lr", "1", "--max_steps", "ten", "--lora_enable", "True", "--bits", "3", "--version", "v1"]
    wrong = ["--data_path", "/no.json", "--model_name_or_path", "/nowhere", "--feature_cache", "/no/cache"]
    assert main(recipe(tmp_path / "out", *flags, *wrong)) == 2
    error = capsys.readouterr().err
    for named in ("--lr ", "--max_steps ten", "--lora_enable", "--bits 3", "--version v1"):
        assert named in error
    for named in ("/no.json", "--model_name_or_path /nowhere: there is no such folder", "/no/cache"):
        assert named in error
    assert "8 problems were found" in error and not (tmp_path / "out" / "mm_projector.bin").exists()


def test_refused_flags_exit_with_1(tmp_path, capsys):
    assert main(recipe(tmp_path / "out", "--lora_enable", "True", "--model_name_or_path", "/nowhere")) == 1
    assert "--lora_enable True" in capsys.readouterr().err
