"""`make test-cluster` where there can be no cluster: a reason, and no failure."""

import os

import pytest

from helpers import run


@pytest.mark.parametrize(
    ("programs", "reason"),
    [
        ({"id": "echo 1000"}, "they need root"),
        ({"id": "echo 0", "apt-get": "exit 100", "dpkg-query": "exit 1"}, "apt-get update failed"),
    ],
)
def test_run_script_skips_with_a_reason(tmp_path, programs, reason):
    for name, command in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    done = run(["bash", "tests/cluster/run.sh", "false"], PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.stdout.startswith(f"cluster tests skipped: {reason}")
