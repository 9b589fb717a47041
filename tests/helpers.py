"""Start processes as a user would."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "llava-extract-features": "pipelines/extract_features.py",
    "llava-train-projector": "pipelines/train_projector.py",
    "llava-inspect-cache": "pipelines/inspect_cache.py",
    "llava-compare-runs": "pipelines/compare_runs.py",
    "llava-use-projector": "pipelines/use_projector.py",
}
# For tests that start several DeepSpeed ranks on the CPU. The first one on a machine takes a minute: it compiles.
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="DeepSpeed compiles its CPU communication on first use; on Debian: apt-get install g++ python3-dev",
)
_ports = []  # handed out since the last free_shared_memory()


def process_environment(**env):
    """Return the environment of every test process: offline, one thread, this checkout first on PYTHONPATH.

    A variable given as None is removed.
    """
    variables = dict(os.environ)
    variables.update(
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        PYTHONUTF8="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        COLUMNS="120",
        # deepspeed, torchrun and ninja of the environment that runs the tests, whether it is activated or not
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    for name, value in env.items():
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = str(value)
    return variables


def run(command, *, expect=0, timeout=300, cwd=ROOT, **env):
    """Run `command` (a list; a leading "python" is this interpreter) and return its CompletedProcess with text output.

    `expect` is the exit code, None for any. With another code, or after a timeout, the test fails and shows the
    output. The command gets a session of its own, so that a launcher's ranks end with it.
    """
    command = [sys.executable if i == 0 and part == "python" else str(part) for i, part in enumerate(command)]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=process_environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
        problem = None if expect in (None, process.returncode) else f"exit code {process.returncode}, not {expect}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        problem = f"still running after {timeout} s"
    except BaseException:  # an interrupted test, or pytest-timeout: leave no process running
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if problem:
        raise AssertionError(
            f"{problem}: {shlex.join(command)}\n--- stdout\n{stdout[-8000:]}\n--- stderr\n{stderr[-8000:]}"
        )
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def project():
    """Return the [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def free_port():
    """Return a TCP port that is free now, for the rendezvous of a launcher."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        _ports.append(listener.getsockname()[1])
        return _ports[-1]


def free_shared_memory():
    """Remove the shared memory that DeepSpeed's ranks leave on a CPU: 69 MB each."""
    while _ports:
        for segment in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{_ports.pop()}_*"):
            segment.unlink()


def fenced_blocks(markdown, language):
    """Return the bodies of the fenced code blocks of one language ("" for blocks without one), in order."""
    return re.findall(rf"^```{language}[ \t]*\n(.*?)^```[ \t]*$", markdown, flags=re.MULTILINE | re.DOTALL)
