"""Errors that a user can mend, as opposed to bugs; knows nothing of what raises them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

RESUMABLE = "interrupted: what was sealed or saved is kept; run the same command again to resume"


class UserError(ValueError):
    """Bad input: the message says what was found, what was expected, and what to type.

    Commands print it as one ``error: ...`` on stderr and exit with 1, without a traceback.
    """


def combined_error(problems: Iterable[str], heading: str, shown: int = 20) -> UserError:
    """Make one error of many problems, so that a user mends them in one go.

    Args:
        problems: One line each.
        heading: What they have in common, without a final colon.
        shown: How many of them to spell out.

    Returns:
        An error that counts all and shows the first ones.
    """
    lines = list(problems)
    more = [f"... and {len(lines) - shown} more"] if len(lines) > shown else []
    return UserError("\n  ".join([f"{heading}:", *lines[:shown], *more]))


def run_command(command: Callable[[], int], interrupted: str = RESUMABLE) -> int:
    """Run a command's body and turn what a user can mend into one line on stderr.

    Args:
        command: Does the work and returns the exit code.
        interrupted: Printed after Ctrl-C.

    Returns:
        What the body returned; 1 after a ``UserError``; 130 after Ctrl-C.
    """
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
