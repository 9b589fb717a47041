"""Every subcommand on caches that are intact, old, damaged, empty, or not caches, and interrupted by Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import ROOT, process_environment, run
from inspection.command import SUBCOMMANDS, inspect
from llava_twophase.cache.shard_files import read_header

JSON = ("summary", "coverage", "stats", "compare", "reencode", "head", "verify", "repair")
ON_A_FOLDER = [name for name in SUBCOMMANDS if name not in ("push", "pull")]  # tests/inspection/test_transfer.py
READS_ROWS = ("stats", "compare", "reencode", "show", "report", "head", "export")


def arguments(subcommand, made, folder, key=None):
    """A complete command line of a subcommand; what it writes goes below `folder`."""
    key = key or made.keys[0]
    rest = {
        "coverage": ["--data_path", made.records],
        "compare": [made.cache],
        "reencode": ["--image_folder", made.images],
        "show": [key, "-o", folder / "shown.png", "--image_folder", made.images],
        "report": ["-o", folder / "report.html", "--image_folder", made.images, "--data_path", made.records],
        "head": [key],
        "export": [key, "-o", folder / "features.npz"],
    }
    return [subcommand, made.cache, *rest.get(subcommand, [])]


def files(folder):
    """Every file's bytes."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit_manifest(made, **values):
    path = made.cache / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def old_schema(made):
    edit_manifest(made, schema=0)


def damaged(made):
    (made.cache / "shards/shard-000001.h5").unlink()


def empty(made):
    for path in (made.cache / "shards").iterdir():
        path.unlink()
    edit_manifest(made, shards=[])


def no_cache(made):
    for path in files(made.cache):
        path.unlink()


def flip_a_row(made):
    """Change one bit of the first image's features."""
    path = made.cache / "shards/shard-000000.h5"
    with path.open("r+b") as file:
        file.seek(read_header(path).datasets["features"].offset)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("subcommand", ON_A_FOLDER)
def test_intact_cache_is_shown_and_not_changed(subcommand, original, tmp_path):
    before = files(original.cache)
    result = inspect(*arguments(subcommand, original, tmp_path))
    assert result.stdout.strip() and "Traceback" not in result.stderr and "\x1b" not in result.stdout
    assert files(original.cache) == before


@pytest.mark.parametrize("subcommand", JSON)
def test_json_is_one_line(subcommand, original, tmp_path):
    result = inspect(*arguments(subcommand, original, tmp_path), "--json")
    assert len(result.stdout.splitlines()) == 1 and isinstance(json.loads(result.stdout), dict)


@pytest.mark.parametrize("state", [old_schema, damaged, empty, no_cache], ids=lambda state: state.__name__)
@pytest.mark.parametrize("subcommand", ON_A_FOLDER)
def test_cache_that_cannot_be_opened_is_one_error(subcommand, state, made, tmp_path):
    state(made)
    result = inspect(*arguments(subcommand, made, tmp_path), expect=1)
    named = {old_schema: "schema version 0", damaged: "shard-000001.h5", empty: "no", no_cache: "no"}[state]
    assert "Traceback" not in result.stderr and named in result.stdout + result.stderr
    if subcommand not in ("verify", "repair"):
        assert result.stdout == "" and result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("*.npz")) + list(tmp_path.glob("*.png")) + list(tmp_path.glob("*.html"))


@pytest.mark.parametrize("subcommand", READS_ROWS)
def test_flipped_bit_in_a_row_is_never_shown(subcommand, made, tmp_path):
    flip_a_row(made)
    result = inspect(*arguments(subcommand, made, tmp_path), expect=1)
    assert f"the features of '{made.keys[0]}' do not match their checksum" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        {"COLUMNS": "20", "NO_COLOR": "1"},
        {"COLUMNS": None, "TERM": "dumb"},
        {"FORCE_COLOR": "1"},
    ],
    ids=["ascii", "narrow", "dumb", "colour"],
)
@pytest.mark.parametrize("subcommand", ["coverage", "report"])
def test_output_in_any_surroundings(subcommand, environment, original, tmp_path):
    result = run(["python", "pipelines/inspect_cache.py", *arguments(subcommand, original, tmp_path)], **environment)
    assert "Traceback" not in result.stderr
    assert ("\x1b[" in result.stdout) <= ("FORCE_COLOR" in environment)


@pytest.mark.parametrize("subcommand", ["stats"])
def test_ctrl_c_prints_one_line(subcommand, made, tmp_path):
    # The reader refuses a FIFO, so the process is stopped when it reads the manifest.
    code = (
        "import sys, time\n"
        "import llava_twophase.cache.reader as reader, llava_twophase.cache.check.verify as verify\n"
        "def wait(*_, **__):\n    print('here', flush=True)\n    time.sleep(60)\n"
        "reader.read_manifest = verify.read_manifest = wait\n"
        "from llava_twophase.inspection.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments(subcommand, made, tmp_path))],
        cwd=ROOT, env=process_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "here\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.startswith("interrupted") and len(errors.splitlines()) == 1


def test_progress_bar_is_for_terminals_only(original, tmp_path):
    assert inspect(*arguments("stats", original, tmp_path)).stderr == ""
