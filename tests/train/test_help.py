"""``--help`` of the training command: every flag once, by subject, as the parser has it."""

import re

import pytest

from llava_twophase.train.cli import main
from llava_twophase.train.command_line import build_parser
from llava_twophase.train.help import help_text, shown_flags
from train.recipe import KNOWN_TO_LLAVA, RECIPE


@pytest.fixture(scope="module")
def real():
    """The actions of the real parser, by option string."""
    return {option: action for action in build_parser().arguments for option in action.option_strings}


def printed(text):
    """Return {flag: its shown default or None} of a help text, and the titles of its groups."""
    text = text.partition("\nexample")[0]
    lines = re.sub(r"\n {5,}", " ", text)  # wrapped help texts
    flags = {}
    for line in re.findall(r"^  (--.*)$", lines, re.M):
        default = re.search(r"\(default: (.*)\)$", line)
        for name in re.findall(r"--\w[\w-]*", re.split(r"\s{2,}", line)[0] if "  " in line else line):
            flags.setdefault(name, default and default[1])
    return flags, re.findall(r"^(\S.*):$", text, re.M)


def test_every_shown_flag_has_the_default_of_the_parser(real):
    flags = [flag for group in shown_flags().values() for flag in group]
    assert len({flag.name for flag in flags}) == len(flags) > 80
    for flag in flags:
        action = real[f"--{flag.name}"]
        assert set(flag.aliases) <= set(action.option_strings)
        if flag.default is not None:
            default = getattr(action.default, "value", action.default)
            assert default == flag.default or str(default) == str(flag.default), flag.name


def test_help_prints_flags_by_subject(capsys, monkeypatch, real):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["--help"]) == 0
    flags, groups = printed(capsys.readouterr().out)
    assert groups[:3] == ["before a run", "models", "data"] and groups[-1] == "help"
    for name, default in flags.items():
        if name in ("--help", "--help-all"):
            continue
        assert name in real
        if default is not None and not re.search(" |^--", default):  # a description of what None means
            known = getattr(real[name].default, "value", real[name].default)
            assert (" ".join(map(str, known)) if isinstance(known, list) else str(known)) == default


def test_help_shows_which_flags_take_several_values_or_none(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for flag in ("vision_tower TOWER", "mm_vision_select_layer LAYER", "feature_cache CACHE", "compute_dtype DTYPE"):
        name, kind = flag.split()
        assert f"--{name} {kind} [{kind} ...]" in shown
    assert "--plan [GPUS]" in shown and "--report_to NAME [NAME ...]" in shown and "--image_folder FOLDER" in shown


def test_flags_without_effect_are_apart_from_those_that_have_one():
    *groups, accepted = shown_flags().values()
    without = re.compile("accepted|must be False|has no effect|stage 1 has one|True would hide a loss")
    assert [flag.name for flag in accepted if not without.match(flag.text)] == []
    assert {"model_name_or_path", "feature_cache", "plan", "bits"} <= {flag.name for group in groups for flag in group}


def test_help_has_every_flag_of_llavas_recipe():
    flags, _ = printed(help_text())
    assert set(re.findall(r"--\w+", RECIPE + KNOWN_TO_LLAVA)) <= set(flags)


def test_help_all_adds_every_other_flag_of_the_parser(capsys, monkeypatch, real):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["--help-all"]) == 0
    flags, groups = printed(capsys.readouterr().out)
    shown, _ = printed(help_text())
    assert {action.option_strings[0] for action in real.values()} <= set(flags)
    assert groups[-1] == "help" and groups[-2] == "Hugging Face Trainer's other flags"
    assert len(set(flags) - set(shown)) > 60


def test_help_is_shorter_than_the_parsers_own_text():
    """The usage has one line, and no flag is in the usage of all flags."""
    lines = help_text().splitlines()
    assert lines[0].startswith("usage: llava-train-projector --model_name_or_path LLM") and lines[1] == ""
