"""The command of phase two: train a projector from a feature cache."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from llava_twophase.distributed import export_slurm_ranks, ranks_from_environment
from llava_twophase.errors import run_command
from llava_twophase.train.help import help_text
from llava_twophase.versions import require_supported


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.

    Returns:
        0 done, 1 a problem was found, 2 wrong usage, 130 interrupted by Ctrl-C, 143 by SIGTERM, 138 by SIGUSR1.
    """
    return run_command(lambda: _parse_and_run(argv))


def _parse_and_run(argv: Sequence[str] | None) -> int:
    tokens = set(sys.argv[1:] if argv is None else argv)
    if tokens & {"-h", "--help", "--help-all"}:
        _print_help(everything="--help-all" in tokens)
        return 0
    import torch

    export_slurm_ranks()
    level = logging.INFO if ranks_from_environment().is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    if not torch.accelerator.is_available():
        # DeepSpeed warns that it found no accelerator unless it is told so.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # First, since importing the modules below may fail with other releases.
    require_supported("transformers", "deepspeed", "torch")
    from llava_twophase.cpu import limit_torch_threads
    from llava_twophase.train.command_line import parse_command

    limit_torch_threads()
    parsed = parse_command(argv)
    if parsed.error() is not None:
        from llava_twophase.train.preflight import find_input_problems

        error = parsed.error(find_input_problems(parsed.arguments, parsed.faulty))
        assert error is not None
        raise error
    from llava_twophase.train.run import run

    return run(parsed.arguments)


def _print_help(everything: bool) -> None:
    if everything:
        from llava_twophase.train.command_line import build_parser

        print(help_text(build_parser().arguments))
    else:
        print(help_text())
