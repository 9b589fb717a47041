"""Checkpoints on disk: mark complete ones, verify them, remove old ones.

HF Trainer writes the files of a checkpoint one by one and from several ranks. ``complete.json``, written when all ranks
are done, tells a complete checkpoint from an interrupted one and holds size and checksum of every file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_twophase.cache.fingerprint import normalize
from llava_twophase.errors import UserError
from llava_twophase.files import explain_os_errors
from llava_twophase.train.layout import Layout
from llava_twophase.train.loop.artefacts import write_json
from llava_twophase.train.loop.checksums import damaged_files, file_checksums, read_checked_json, write_checked_json
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.micro_batches import MicroBatching

MARKER = "complete.json"
FINISHED = "finished.json"
_MICRO_BATCHING = "micro_batching.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class CheckpointRecord:
    """The content of ``complete.json``.

    Attributes:
        identity: What a run that resumes from the checkpoint must have in common with the one that wrote it.
        steps_per_epoch: Optimizer steps of an epoch.
        layout: Layout of the run that wrote the checkpoint.
        origin: Layout at the run's start, which decides the samples of each step and their weights in the loss.
        files: Size and checksum of every other file of the checkpoint.
    """

    identity: dict[str, Any]
    steps_per_epoch: int
    layout: Layout
    origin: Layout
    files: dict[str, dict[str, Any]]

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CheckpointRecord:
        """Return what ``dataclasses.asdict`` turned into a dictionary."""
        layouts = {name: Layout(**content[name]) for name in ("layout", "origin")}
        return cls(**{**content, **layouts})


class CheckpointKeeper(TrainerCallback):
    """Marks complete checkpoints and removes old ones.

    Args:
        identity: What a run that resumes from them must have in common with this one.
        keep: How many to keep, None for all.
        layout: This run's layout.
        origin: Layout at the run's start, if it was resumed with another one.
        frozen: The LLM, whose micro-batches are stored: other ones would round differently after a resume.

    Attributes:
        steps_per_epoch: Optimizer steps of an epoch, known when training has begun.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        keep: int | None,
        layout: Layout,
        origin: Layout | None = None,
        frozen: FrozenLLM | None = None,
    ) -> None:
        self._identity = normalize(identity)
        self._keep = keep
        self._layout, self._origin = layout, origin or layout
        self._frozen = frozen
        self.steps_per_epoch = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Unmark a finished run, and checkpoints newer than the one being resumed; they will be overwritten."""
        if train_dataloader is not None:
            self.steps_per_epoch = ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir))
            (folder / FINISHED).unlink(missing_ok=True)
            for checkpoint in complete_checkpoints(folder):
                if checkpoint_step(checkpoint) > state.global_step:
                    remove_marker(checkpoint)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Log whenever a checkpoint is written; otherwise a resume would lose the losses since the last log."""
        control.should_log = control.should_log or control.should_save
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Do the same for ``--save_strategy epoch``."""
        return self.on_step_end(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint that all ranks have written, then remove old ones."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        checkpoint = folder / f"checkpoint-{state.global_step}"
        remove_marker(checkpoint)
        if self._frozen is not None and self._frozen.micro_batching is not None:
            write_json(checkpoint / _MICRO_BATCHING, asdict(self._frozen.micro_batching))
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        for path in files:
            _sync(path)
        record = CheckpointRecord(
            identity=self._identity,
            steps_per_epoch=self.steps_per_epoch,
            layout=self._layout,
            origin=self._origin,
            files=file_checksums(checkpoint, files),
        )
        write_marker(checkpoint, record)
        for old in self._surplus(complete_checkpoints(folder), state.best_model_checkpoint):
            # The marker is removed first: an interrupted removal leaves no checkpoint that looks complete.
            remove_marker(old)
            shutil.rmtree(old)

    def _surplus(self, complete: list[Path], best: str | None) -> list[Path]:
        # As HF Trainer does: the newest is kept, and the best one with --metric_for_best_model.
        if self._keep is None or self._keep <= 0:
            return []
        kept = {complete[-1].name, Path(best or complete[-1]).name}
        candidates = [path for path in complete if path.name not in kept]
        return candidates[: max(0, len(complete) - max(self._keep, len(kept)))]


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints that have a marker, oldest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return [path for path in sorted(found, key=checkpoint_step) if (path / MARKER).exists()]


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was written; -1 for a folder with another name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def write_marker(checkpoint: Path, record: CheckpointRecord) -> None:
    """Write a checkpoint's ``complete.json``."""
    write_checked_json(checkpoint / MARKER, asdict(record))


def read_record(checkpoint: Path) -> CheckpointRecord:
    """Read a checkpoint's ``complete.json``.

    Raises:
        UserError: It is missing or damaged, or was written by another version.
    """
    content = read_checked_json(checkpoint / MARKER)
    try:
        return CheckpointRecord.from_dict(content)
    except (TypeError, KeyError):
        raise UserError(f"{MARKER} was written by another version") from None


def remove_marker(checkpoint: Path) -> None:
    """Remove a checkpoint's ``complete.json``, if it has one."""
    marker = checkpoint / MARKER
    if marker.is_dir():  # damaged
        shutil.rmtree(marker)
    else:
        marker.unlink(missing_ok=True)


def checkpoint_problems(checkpoint: Path, content: bool = True) -> list[str]:
    """Return a line for each damaged or missing file of a checkpoint.

    Args:
        checkpoint: Its folder.
        content: Read the files; otherwise only their sizes are compared.
    """
    try:
        return damaged_files(checkpoint, read_record(checkpoint).files, content)
    except UserError as error:
        return [str(error)]


def explain_disk_errors(output_dir: Path) -> AbstractContextManager[None]:
    """Turn errors of the disk that a run writes to into a ``UserError`` that says what to do."""

    def advice() -> str:
        newest = next(reversed(complete_checkpoints(output_dir)), None)
        start = "starts from the beginning" if newest is None else f"resumes from {newest.name}"
        return f"run the same command again: it {start}"

    # torch and safetensors report a full disk as errors of their own.
    return explain_os_errors(output_dir, "--output_dir", advice, also=(RuntimeError, SafetensorError))


def saved_micro_batching(checkpoint: Path) -> MicroBatching | None:
    """Return how batches were split when a checkpoint was written; None if no batch had been trained on."""
    path = checkpoint / _MICRO_BATCHING
    return MicroBatching.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
