"""Command 2, phase two: a feature cache to a trained projector; flags in ``arguments.py``, the run in ``run.py``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from llava_twophase.distributed import ranks_from_environment
from llava_twophase.errors import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.

    Returns:
        0 done, 1 a problem was found, 2 wrong usage (raised by argparse), 130 interrupted.
    """
    level = logging.INFO if ranks_from_environment().is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    return run_command(lambda: _parse_and_run(argv))


def _parse_and_run(argv: Sequence[str] | None) -> int:
    from llava_twophase.train.versions import require_supported

    # At once, since other releases may fail at the import of what follows.
    require_supported()
    from llava_twophase.train.arguments import parse_arguments

    arguments = parse_arguments(argv)

    # Trainer, accelerate and DeepSpeed are imported only now, so that --help and a typo answer sooner.
    from llava_twophase.train.run import run

    return run(arguments)
