"""Checks of packages, launcher, output folder and disk, made before anything is loaded."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import Trainer
from transformers.training_args import OptimizerNames

from llava_twophase.compat import is_tracker_installed
from llava_twophase.errors import UserError
from llava_twophase.files import require_free_space, require_writable
from llava_twophase.text import counted
from llava_twophase.train.arguments import Arguments

# AdamW in float32 keeps weight, two moments and, under DeepSpeed, a master copy.
_CHECKPOINT_BYTES_PER_WEIGHT = 20


def require_trackers(arguments: Arguments) -> None:
    """Check that the trackers of ``--report_to`` are known and installed.

    Raises:
        UserError: One is not.
    """
    for name in arguments.training.report_to or []:
        try:
            installed = is_tracker_installed(name)
        except ValueError as error:
            raise UserError(f"--report_to {name}: {error}; or use --report_to none") from None
        if not installed:
            raise UserError(f"--report_to {name} is not installed: pip install {name}, or use --report_to none")


def require_launcher(arguments: Arguments) -> None:
    """Check that DeepSpeed has a launcher's variables; otherwise it asks MPI, and fails after the LLM was loaded.

    Raises:
        UserError: It has none.
    """
    if arguments.training.deepspeed and "RANK" not in os.environ and find_spec("mpi4py") is None:
        raise UserError(
            "--deepspeed needs a launcher: deepspeed pipelines/train_projector.py ..., torchrun or srun; for one "
            "process, remove --deepspeed"
        )


def require_optimizer(arguments: Arguments) -> None:
    """Check that the packages of ``--optim`` are installed.

    Raises:
        UserError: They are not.
    """
    training = arguments.training
    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except (ImportError, ValueError) as error:
        raise UserError(f"--optim {OptimizerNames(training.optim).value}: {error}; or remove --optim") from None


def require_compiler(arguments: Arguments) -> None:
    """Check that torch has the backend of ``--torch_compile``.

    Raises:
        UserError: It does not.
    """
    training = arguments.training
    backends = torch.compiler.list_backends(exclude_tags=())
    if training.torch_compile and training.torch_compile_backend not in backends:
        raise UserError(f"--torch_compile_backend {training.torch_compile_backend}: torch has {', '.join(backends)}")


def require_output(arguments: Arguments) -> None:
    """Create ``--output_dir``; with ``--plan``, only check that it can be written.

    Raises:
        UserError: It cannot be created or written, or a folder has the name of a file that the run would write.
    """
    given = str(arguments.training.output_dir)
    if "://" in given:
        raise UserError(f"--output_dir {given}: it must be a folder on this machine; copy it after the run")
    folder = output_folder(arguments)
    if arguments.training.plan is not None:
        return require_writable(folder, "--output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be created: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder} is not writable; give another one")
    # mm_projector.bin, config.json, loss.png and the like; the folders of a run have no suffix.
    for path in sorted(folder.iterdir()):
        if path.suffix in (".bin", ".json", ".png") and path.is_dir():
            raise UserError(f"--output_dir {folder} has a folder {path.name}, expected a file: rm -r {path}")


def require_space(arguments: Arguments, weights: int) -> None:
    """Check that the disk has space for the checkpoints.

    Args:
        arguments: The run's arguments.
        weights: Trainable weights.

    Raises:
        UserError: It does not.
    """
    kept, size = checkpoint_space(arguments, weights)
    require_free_space(
        output_folder(arguments),
        kept * size,
        what=counted(kept, "checkpoint"),
        advice="free some space, or lower --save_total_limit",
    )


def checkpoint_space(arguments: Arguments, weights: int) -> tuple[int, int]:
    """Return how many checkpoints are on disk at once, and the most bytes that one takes.

    Args:
        arguments: The run's arguments.
        weights: Trainable weights.
    """
    training = arguments.training
    # The new checkpoint is written before the oldest one is removed.
    kept = 1 + (training.save_total_limit or 2) if training.save_strategy != "no" else 1
    return kept, weights * _CHECKPOINT_BYTES_PER_WEIGHT


def output_folder(arguments: Arguments) -> Path:
    """Return ``--output_dir``."""
    return Path(str(arguments.training.output_dir))
