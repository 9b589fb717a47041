"""Starts the extraction command in forks of a process that has imported everything: a tenth of a second each.

Run as a script it is the server; imported it is the client.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

from helpers import process_environment

# The calls that make a run's work durable; tests kill a run before each of them.
STEPS = ("pwrite", "fsync", "replace", "unlink")


class Server:
    """A process that starts commands; a context."""

    def __enter__(self):
        self._logs = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**process_environment(SOURCE_DATE_EPOCH=0), "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )
        self._number = 0
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        self._logs.cleanup()

    def start(self, command, crash_at=None, **env):
        """Start `llava-extract-features` with the arguments `command`; `crash_at` kills it before its nth STEP."""
        self._number += 1
        log = Path(self._logs.name) / f"{self._number}.log"
        arguments = [str(part) for part in command]
        environment = {name: str(value) for name, value in env.items()}
        return Run(self, self.ask("start", arguments, str(log), crash_at, environment), log)

    def run(self, command, expect=0, crash_at=None, **env):
        """Run a command to its end and return what it logged."""
        started = self.start(command, crash_at, **env)
        code = started.wait()
        assert code == expect, f"exit code {code}, not {expect}\n{started.log()}"
        return started.log()

    def ask(self, *question):
        """Send one request and return its answer."""
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Run:
    """A running command, the leader of its own process group."""

    def __init__(self, server, pid, log):
        self._server = server
        self.pid = pid
        self._log = log
        self.code = None

    def kill(self, kind=signal.SIGKILL):
        """Send a signal to the command and its workers, if it is still running."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, kind)

    def wait(self):
        """Wait for the end; returns the exit code, negative for a signal."""
        if self.code is None:
            self.code = self._server.ask("wait", self.pid)
        return self.code

    def log(self):
        """All that the command printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")


def files(cache):
    """Every file of a cache by its path, as bytes."""
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def _serve():
    import h5py  # noqa: F401
    import transformers  # noqa: F401

    import llava_twophase.extract.run  # noqa: F401

    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        answer = _start(*arguments) if kind == "start" else os.waitstatus_to_exitcode(os.waitpid(arguments[0], 0)[1])
        print(json.dumps(answer), flush=True)


def _start(command, log, crash_at, env):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ.update(env)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if crash_at is not None or "COUNT_STEPS" in env:
            _crash_before_step(crash_at)
        from llava_twophase.extract.cli import main

        code = main(command)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _crash_before_step(number):
    # With `number` None the steps are only counted, as lines of the file COUNT_STEPS.
    lock, taken = threading.Lock(), [0]

    def counted(name, call):
        def step(*arguments, **options):
            with lock:
                taken[0] += 1
                if taken[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                if number is None:
                    with open(os.environ["COUNT_STEPS"], "a", encoding="utf-8") as file:
                        file.write(f"{name}\n")
            return call(*arguments, **options)

        return step

    for name in STEPS:
        setattr(os, name, counted(name, getattr(os, name)))


if __name__ == "__main__":
    _serve()
