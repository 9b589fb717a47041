"""The inspection command inside the test process: fast, and with its output captured."""

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

from llava_twophase.inspection.cli import build_parser, main

SUBCOMMANDS = tuple(re.search(r"\{([\w,]+)\}", build_parser().format_usage().replace("\n", "")).group(1).split(","))


def inspect(*arguments, expect=0):
    """Run `llava-inspect-cache`; return stdout and stderr. `expect` is the exit code."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # --help
            code = stop.code
    found = SimpleNamespace(stdout=stdout.getvalue(), stderr=stderr.getvalue())
    assert code == expect, f"exit code {code}, not {expect}\n{found.stdout}\n{found.stderr}"
    return found
