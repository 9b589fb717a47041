"""The command's usage, help, output and exit codes: in any surroundings, on any cache."""

import json
import os
import subprocess
import sys

import pytest

from cache.make import FINGERPRINT, make_cache, make_shard, rows, write
from helpers import ROOT, process_environment, run
from inspection.command import SUBCOMMANDS, inspect
from llava_twophase.cache.format import SHARDS

SCRIPT = "pipelines/inspect_cache.py"
SHARD = "shards/shard-000000.h5"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")[0]


@pytest.mark.parametrize("subcommand", [[], *([name] for name in SUBCOMMANDS)], ids=str)
def test_help_ends_with_an_example(subcommand):
    lines = inspect(*subcommand, "--help").stdout.splitlines()
    assert lines[-2] == "example:" and lines[-1].startswith("  llava-inspect-cache ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["summary"],
        ["summary", "c", "--no-such-flag"],
        ["show", "c", "k"],
        ["verify", "c", "extra"],
        ["show", "c", "k", "-o", "o", "--image_folder", "i", "--patch", "3"],
        ["export", "c", "k", "-o", "k.txt"],
        ["stats", "c", "--n", "0"],
        ["stats", "c", "--seed", "-1"],
        ["report", "c", "-o", "o", "--n", "501"],
        ["stats", "c", "--plot", "p.txt"],
        ["report", "c"],
        ["compare", "c"],
        ["coverage", "c"],
    ],
    ids=str,
)
def test_wrong_usage_exits_with_2(arguments):
    result = inspect(*arguments, expect=2)
    assert result.stdout == "" and "usage: llava-inspect-cache" in result.stderr


@pytest.mark.parametrize("size", ["0", "1.5", "many", "100000"])
def test_size_out_of_range_is_wrong_usage(size):
    assert "--size" in inspect("show", "c", "k", "-o", "o", "--image_folder", "i", "--size", size, expect=2).stderr


@pytest.mark.parametrize("subcommand", ["summary", "verify"])
def test_folder_that_is_not_a_cache_is_one_error(subcommand, tmp_path):
    result = inspect(subcommand, tmp_path / "nothing", expect=1)
    assert result.stdout == "" and result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_inspection_loads_no_torch(cache):
    code = (
        "import sys\n"
        "from llava_twophase.inspection.cli import main\n"
        "codes = [main([command, sys.argv[1]]) for command in ('summary', 'verify', 'repair', 'stats')]\n"
        "print(codes, sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))\n"
    )
    assert run(["python", "-c", code, cache]).stdout.splitlines()[-1] == "[0, 0, 0, 0] []"


@pytest.mark.parametrize(
    "environment",
    [
        ASCII,
        {"COLUMNS": "20"},
        {"COLUMNS": None, "TERM": "dumb", "NO_COLOR": "1"},
    ],
    ids=["ascii", "narrow", "dumb"],
)
def test_output_in_any_surroundings(environment, tmp_path):
    cache = tmp_path / "cache"
    (cache / SHARDS).mkdir(parents=True)
    made = {**FINGERPRINT, "note": "größer → 大"}
    entry = make_shard(cache / SHARD, ["größer/大.jpg", "b.jpg"], rows(2), fingerprint=made)
    write(cache, [entry], fingerprint=made)
    text = "".join(process("summary", cache, **environment).stdout.split())
    assert ("gr\\xf6\\xdfer\\u2192\\u5927" if "LC_ALL" in environment else "größer→大") in text
    assert json.loads(process("summary", cache, "--json", **environment).stdout)["fingerprint"] == made
    with (cache / SHARD).open("r+b") as file:
        file.seek(-2500, os.SEEK_END)
        file.write(b"\xab\xcd")
    assert "1 problem found" in process("verify", cache, expect=1, **environment).stdout


def process(*arguments, **options):
    return run(["python", SCRIPT, *arguments], **options)


def test_closed_pipe_ends_without_a_message(cache):
    command = [sys.executable, SCRIPT, "summary", str(cache)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=process_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()
