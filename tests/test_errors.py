"""Errors for users: one message on stderr and an exit code, never a traceback."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from llava_twophase.errors import (
    RESUMABLE,
    UserError,
    combined_error,
    raise_on_termination,
    run_command,
    short_repr,
)


def test_combined_error_lists_the_first_problems_and_counts_the_others():
    error = combined_error((f"problem {number}" for number in range(5)), "5 problems", shown=2)
    assert isinstance(error, UserError)
    assert str(error) == "5 problems:\n  problem 0\n  problem 1\n  ... and 3 more"
    assert str(combined_error(["one"], "a problem")) == "a problem:\n  one"


def test_short_repr_truncates_long_values():
    assert short_repr(["a"]) == "['a']"
    assert short_repr("x" * 200) == "'" + "x" * 79 + "..."


def test_run_command_returns_the_exit_code_of_the_command(capsys):
    assert run_command(lambda: 3) == 3
    assert capsys.readouterr() == ("", "")


def test_run_command_prints_a_user_error_and_returns_1(capsys):
    def fail():
        raise UserError("no such file")

    assert run_command(fail) == 1
    assert capsys.readouterr() == ("", "error: no such file\n")


def test_run_command_returns_130_after_ctrl_c(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert run_command(interrupt) == 130 and run_command(interrupt, "stopped") == 130
    assert capsys.readouterr().err == f"{RESUMABLE}\nstopped\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_run_command_returns_128_plus_the_signal_after_termination(number, code, capsys):
    former = signal.getsignal(number)

    def interrupted():
        with raise_on_termination():
            os.kill(os.getpid(), number)
            signal.pause()
        return 0

    assert run_command(interrupted) == code
    assert capsys.readouterr().err == f"received {number.name}: {RESUMABLE}\n"
    assert signal.getsignal(number) == former


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_raise_on_termination_ends_a_forked_process_at_once():
    with raise_on_termination():
        pid = os.fork()
        if not pid:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143


def test_raise_on_termination_changes_nothing_in_another_thread():
    handlers = []

    def look():
        with raise_on_termination():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize(("terminal", "chosen", "found"), [(False, None, "1"), (True, None, None), (False, "", "")])
def test_run_command_shows_progress_bars_on_a_terminal_only(terminal, chosen, found, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if chosen is not None:
        monkeypatch.setenv("TQDM_DISABLE", chosen)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    run_command(lambda: 0)
    assert os.environ.get("TQDM_DISABLE") == found


def test_run_command_ends_silently_with_141_if_the_reader_of_stdout_ended():
    program = (
        "import sys; from llava_twophase.errors import run_command; sys.exit(run_command(lambda: print('x') or 0))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (141, b"")


def test_run_command_does_not_hide_a_broken_pipe_that_is_not_stdout():
    def fail():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_command(fail)


def test_run_command_does_not_hide_bugs():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)
