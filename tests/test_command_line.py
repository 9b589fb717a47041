"""The parser of all commands: problems are collected, and the usage has one line."""

import argparse

import pytest

from llava_twophase.command_line import CommandParser, Integer, UsageError, problems_error
from llava_twophase.errors import UserError


def make_parser():
    parser = CommandParser(prog="tool")
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    parser.add_argument("--batch_size", type=Integer(1), default=8)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=8)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--json", action="store_true")
    return parser


def make_parser_of_subcommands():
    parser = CommandParser(prog="tool")
    commands = parser.add_subparsers()
    commands.add_parser("summary").add_argument("cache", metavar="CACHE")
    commands.add_parser("verify").add_argument("--n", type=Integer(1, 9))
    return parser


def problems_of(parser, *args):
    with pytest.raises(UsageError) as caught:
        parser.parse_args(args)
    *problems, usage = str(caught.value).splitlines()
    assert usage.startswith("usage: tool ") and caught.value.exit_code == 2
    return problems


def test_parse_args_returns_converted_values():
    found = make_parser().parse_args(["a", "b", "-o", "f", "--batch_size", "4", "--bits=4", "--json", "--rate", "-1"])
    expected = {"images": ["a", "b"], "output": "f", "batch_size": 4, "dtype": "bf16", "bits": 4, "rate": -1.0}
    assert vars(found) == {**expected, "json": True}


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--batch_size", "0"], "--batch_size 0: expected a whole number of at least 1"),
        (["--batch_size", "four"], "--batch_size four: expected a whole number of at least 1"),
        (["--batch_size"], "--batch_size: expected one argument"),
        (["--dtype", "fp8"], "--dtype fp8: expected one of bf16, fp32"),
        (["--bits", "3"], "--bits 3: expected one of 4, 8"),
        (["--bits", "many"], "--bits many: expected one of 4, 8"),
        (["--rate", "fast"], "--rate fast: expected a number"),
        (["--json=1"], "--json: ignored explicit argument '1'"),
        (["--batch-size", "4"], "--batch-size is not a flag; did you mean --batch_size?"),
        (["--batchsize=4"], "--batchsize is not a flag; did you mean --batch_size?"),
        (["--zzzzzzzz", "4"], "--zzzzzzzz is not a flag"),
        (["-x"], "-x is not a flag"),
    ],
)
def test_parse_args_says_what_was_found_and_expected(args, problem):
    assert problems_of(make_parser(), "a.jpg", "-o", "f", *args) == [problem]


def test_parse_args_reports_all_problems_and_missing_arguments():
    problems = problems_of(make_parser(), "--dtype", "fp8", "--jsn", "--batch_size", "0", "--rate")
    assert problems[0] == "6 problems were found; nothing was started:"
    assert sorted(problems[1:]) == [
        "  --batch_size 0: expected a whole number of at least 1",
        "  --dtype fp8: expected one of bf16, fp32",
        "  --jsn is not a flag; did you mean --json?",
        "  --output is required",
        "  --rate: expected one argument",
        "  IMAGE is required",
    ]


def test_collect_keeps_valid_values_and_defaults_of_wrong_ones():
    parser = make_parser()
    found = parser.collect(["a.jpg", "--batch_size", "0", "--rate", "2", "--jsn"])
    assert (found.images, found.batch_size, found.rate) == (["a.jpg"], 8, 2.0)
    assert parser.faulty == {"batch_size", "output"} and len(parser.problems) == 3
    parser.collect(["a.jpg", "-o", "f"])
    assert parser.problems == []


def test_usage_line_has_the_required_arguments_only():
    assert make_parser().usage_line() == "usage: tool IMAGE --output FILE ... (--help lists all flags)"


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ([], "a subcommand is missing; expected one of summary, verify"),
        (["sumary", "c"], "'sumary' is not a subcommand; did you mean summary?"),
        (["zzz"], "'zzz' is not a subcommand; expected one of summary, verify"),
        (["sumary", "--help"], "'sumary' is not a subcommand; did you mean summary?"),
        (["summary"], "CACHE is required"),
        (["summary", "c", "d"], "'d' does not belong to a flag"),
        (["verify", "--n", "10"], "--n 10: expected a whole number from 1 to 9"),
    ],
)
def test_subcommands_are_checked(args, problem):
    assert problems_of(make_parser_of_subcommands(), *args) == [problem]


def test_help_of_a_parser_and_of_its_subcommands_exits_with_0(capsys):
    for args in (["--help"], ["summary", "-h"]):
        with pytest.raises(SystemExit) as stop:
            make_parser_of_subcommands().parse_args(args)
        assert stop.value.code == 0 and "usage: tool" in capsys.readouterr().out


def test_error_raises_a_usage_error():
    with pytest.raises(UsageError, match="give a format\nusage: tool IMAGE"):
        make_parser().error("give a format")


def test_other_names_come_before_similar_ones():
    class Parser(CommandParser):
        other_names = {"--bs": "--batch_size"}

    parser = Parser(prog="tool")
    parser.add_argument("--batch_size")
    parser.add_argument("--best")
    assert problems_of(parser, "--bs", "4") == ["--bs is not a flag; did you mean --batch_size?"]


def test_types_may_say_what_they_expect():
    def even(text):
        if int(text) % 2:
            raise argparse.ArgumentTypeError("expected an even number")
        return int(text)

    parser = CommandParser(prog="tool")
    parser.add_argument("--n", type=even)
    assert problems_of(parser, "--n", "3") == ["--n 3: expected an even number"]
    assert parser.parse_args(["--n", "4"]).n == 4


def test_problems_error_is_a_usage_error_only_with_a_usage():
    assert str(problems_error(["one"])) == "one" and type(problems_error(["one"])) is UserError
    assert str(problems_error(["one", "two"], "usage: x")) == (
        "2 problems were found; nothing was started:\n  one\n  two\nusage: x"
    )
