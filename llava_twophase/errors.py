"""Errors that a user can fix, as opposed to bugs, and how commands print them."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

_CLOSED_PIPE = 141  # as a process that SIGPIPE ends
RESUMABLE = "interrupted: what was sealed or saved is kept; run the same command again to resume"


class UserError(ValueError):
    """Bad input: the message says what was found, what was expected, and what to type.

    Commands print it as one ``error: ...`` on stderr, without a traceback.

    Attributes:
        exit_code: The exit code of the command.
    """

    exit_code = 1


class Terminated(KeyboardInterrupt):
    """A signal with which schedulers announce the end of a job.

    Attributes:
        exit_code: 128 plus the signal's number, as a shell reports it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"received {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def raise_on_termination() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 raise ``Terminated`` in the block, and end processes that are forked there.

    Signals are handled by the main thread; in another one, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            os._exit(128 + number)
        raise Terminated(number)

    former = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def combined_error(problems: Iterable[str], heading: str, shown: int = 20, total: int | None = None) -> UserError:
    """Combine problems into one error, so that a user can fix all of them at once.

    Args:
        problems: One line each.
        heading: What they have in common, without a final colon.
        shown: The number of problems that are listed; the others are counted.
        total: The number of problems if not all are given.
    """
    lines = list(problems)
    others = (len(lines) if total is None else total) - shown
    more = [f"... and {others} more"] if others > 0 else []
    return UserError("\n  ".join([f"{heading}:", *lines[:shown], *more]))


def short_repr(value: object, length: int = 80) -> str:
    """Return the repr of a value for a message, truncated to ``length`` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _stdout_is_closed() -> bool:
    """Return whether the reader of stdout ended, as ``head`` does; from then on, output is discarded."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    closed = any(events & select.POLLERR for _, events in poll.poll(0))
    if closed:  # Python would flush once more at exit and report the error again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def run_command(command: Callable[[], int], interrupted: str = RESUMABLE) -> int:
    """Run the body of a command, and print a ``UserError`` as one message on stderr.

    Progress bars, those of libraries too, are shown on a terminal only: in a log file each update would be a line.

    Args:
        command: Does the work and returns the exit code.
        interrupted: Printed after Ctrl-C and ``Terminated``.

    Returns:
        The exit code: 1 after a ``UserError``, 2 if it is a ``UsageError``, 130 after Ctrl-C, that of
        ``Terminated``, 141 if the reader of stdout ended.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is imported, so commands import it later
    try:
        code = command()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        return _CLOSED_PIPE
    except Terminated as error:
        print(f"{error}: {interrupted}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
