"""Results as text and JSON, and result files: full disks, missing folders, devices, and several processes."""

import io
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from cache.make import make_cache
from helpers import ROOT, process_environment
from inspection.command import inspect
from llava_twophase.errors import UserError
from llava_twophase.inspection import output

OUTPUTS = {"show": "o.png", "report": "o.html", "export": "o.npz"}


def command(subcommand, cache, key, file, images):
    rest = {"show": [key, "--image_folder", images], "report": [], "export": [key]}[subcommand]
    return [subcommand, cache, *rest, "-o", file]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_print_result_has_null_for_numbers_that_are_not_finite(value, capsys):
    output.print_result({"a": [value, 1.5], "b": {"c": (value, "text")}}, True, lambda out: None)
    assert capsys.readouterr().out == '{"a": [null, 1.5], "b": {"c": [null, "text"]}}\n'


def test_print_table_wraps_words_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = "a sentence of words that is longer than the terminal, so it continues below, in its own column"
    output.print_names({"name": text, "another name": "short"}, output.console())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines[:2]).split()) == f"name {text}"


@pytest.mark.parametrize("subcommand", OUTPUTS)
def test_file_that_cannot_be_written_is_reported_before_the_work(subcommand, tmp_path, monkeypatch):
    cache, keys, _ = make_cache(tmp_path / "cache")
    monkeypatch.setattr("llava_twophase.inspection.rows.CheckedRows.stored", lambda *_: pytest.fail("rows were read"))
    for file, reason in ((tmp_path / "none" / OUTPUTS[subcommand], "is not a folder"), (tmp_path, "is a folder")):
        arguments = command(subcommand, cache, keys[0], file, tmp_path)
        errors = inspect(*arguments, *(["--to", "npz"] if subcommand == "export" else []), expect=1).stderr
        assert errors.startswith(f"error: -o {file}") and reason in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt"])
def test_export_to_a_full_disk_is_one_error(suffix, tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache", counts=(400,), shape=(64, 64))
    errors = inspect("export", cache, *keys, "-o", "/dev/full", "--to", suffix, expect=1).stderr
    assert errors.startswith("error: -o /dev/full cannot be written: ") and len(errors.splitlines()) == 1


def test_failed_write_keeps_the_older_file(tmp_path):
    path = tmp_path / "result"
    path.write_bytes(b"older")

    def fail(file):
        file.write(b"new")
        raise OSError(28, os.strerror(28))

    with pytest.raises(UserError, match="No space left on device"):
        output.write_file(str(path), fail)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def _write(path, value):
    for _ in range(30):
        output.write_file(path, lambda file: [file.write(bytes([value]) * 1000) for _ in range(50)])


def test_two_processes_may_write_one_file(tmp_path):
    path = tmp_path / "result"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(str(path), value)) for value in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    content = path.read_bytes()
    assert len(content) == 50_000 and len(set(content)) == 1 and list(tmp_path.iterdir()) == [path]


def start(arguments, **streams):
    return subprocess.Popen(
        [sys.executable, "pipelines/inspect_cache.py", *map(str, arguments)],
        cwd=ROOT, env=process_environment(), stderr=subprocess.PIPE, text=True, **streams,
    )  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_closed_pipe_ends_silently(flags, tmp_path):
    cache = make_cache(tmp_path / "cache")[0]
    process = start(["summary", cache, *flags], stdout=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (141, "")


def test_full_disk_of_stdout_is_one_error(tmp_path):
    cache = make_cache(tmp_path / "cache")[0]
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = start(["summary", cache], stdout=full)
        _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.startswith("error: the output cannot be written: No space left on device")


def test_device_as_the_output_file_receives_the_file_only(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache")
    command = [sys.executable, "pipelines/inspect_cache.py", "export", cache, keys[0], "-o", "/dev/stdout"]
    done = subprocess.run([*command, "--to", "pt"], cwd=ROOT, env=process_environment(), capture_output=True)
    assert done.returncode == 0 and b"wrote /dev/stdout: features 1 x 9 x 32" in done.stderr
    content = torch.load(io.BytesIO(done.stdout), weights_only=True)
    assert content["features"].shape == (1, 9, 32) and content["keys"] == [keys[0]]
