"""Which checkpoints are whole, and whether this run may go on from one; what is in them is Trainer's and DeepSpeed's.

Trainer writes a checkpoint's files one by one and from several ranks. A marker, written when all ranks are done, tells
a whole checkpoint from one that a kill cut short; older ones are removed only after it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_twophase.cache.fingerprint import differences, normalize
from llava_twophase.errors import UserError, combined_error
from llava_twophase.files import explain_os_errors
from llava_twophase.train.loop.artefacts import write_json
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.micro_batches import MicroBatching

logger = logging.getLogger(__name__)

MARKER = "complete.json"
_MICRO_BATCHING = "micro_batching.json"
_MICRO_BATCHING_UNTIL_0_4 = "cut.json"


class CheckpointKeeper(TrainerCallback):
    """Marks whole checkpoints and keeps the newest of them.

    Args:
        identity: What a run that goes on from them must have in common with this one.
        keep: How many to keep, None for all.
        frozen: The LLM, whose micro-batching is saved: another one would round differently after a resume.
    """

    def __init__(self, identity: dict[str, Any], keep: int | None, frozen: FrozenLLM | None = None) -> None:
        self._identity, self._keep, self._frozen = identity, keep, frozen

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take their markers from checkpoints behind the one that the run goes on from: they will be written anew."""
        if state.is_world_process_zero:
            for newer in whole_checkpoints(Path(str(args.output_dir))):
                if _step(newer) > state.global_step:
                    (newer / MARKER).unlink()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Log whenever a checkpoint is written: the losses since the last log would otherwise be lost to a resume."""
        control.should_log = control.should_log or control.should_save
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """As after a step, for ``--save_strategy epoch``."""
        return self.on_step_end(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint that all ranks have written, then remove what is older than ``keep``."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        checkpoint = folder / f"checkpoint-{state.global_step}"
        if self._frozen is not None and self._frozen.micro_batching is not None:
            write_json(checkpoint / _MICRO_BATCHING, asdict(self._frozen.micro_batching))
        for path in checkpoint.rglob("*"):
            if path.is_file():
                _sync(path)
        write_json(checkpoint / MARKER, self._identity)
        for old in self._surplus(whole_checkpoints(folder), state.best_model_checkpoint):
            # The marker goes first: a removal that is cut short leaves no checkpoint that looks whole.
            (old / MARKER).unlink()
            shutil.rmtree(old)

    def _surplus(self, whole: list[Path], best: str | None) -> list[Path]:
        # As Trainer does: the newest stays, and the best where --metric_for_best_model asks for one.
        if self._keep is None or self._keep <= 0:
            return []
        stay = {whole[-1].name, Path(best or whole[-1]).name}
        return [path for path in whole if path.name not in stay][: max(0, len(whole) - max(self._keep, len(stay)))]


def whole_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints with a marker, oldest step first; one without was cut short and is never resumed from."""
    found = [path for path in output_dir.glob("checkpoint-*") if _STEP.fullmatch(path.name)]
    return [path for path in sorted(found, key=_step) if (path / MARKER).is_file()]


def checkpoint_to_resume(output_dir: Path, asked: str | None, identity: dict[str, Any]) -> Path | None:
    """Choose where to go on from: the same command run again goes on from its newest whole checkpoint.

    Args:
        output_dir: The run's folder.
        asked: ``--resume_from_checkpoint``, a folder; None or ``True`` for the newest one.
        identity: This run's.

    Returns:
        The checkpoint's folder, None to start from the beginning.

    Raises:
        UserError: There is none where one was asked for, or it belongs to a run with other settings.
    """
    if asked is not None and asked not in ("True", "true"):
        found: Path | None = Path(asked)
        if not (Path(asked) / MARKER).is_file():
            raise UserError(f"--resume_from_checkpoint {asked} is no whole checkpoint: it has no {MARKER}")
    else:
        found = next(reversed(whole_checkpoints(output_dir)), None)
        if found is None and asked is not None:
            raise UserError(f"--resume_from_checkpoint True: {output_dir} holds no whole checkpoint")
    if found is None:
        return None
    saved = json.loads((found / MARKER).read_text(encoding="utf-8"))
    different = differences(saved, normalize(identity), names=("the checkpoint", "this run"))
    if different:
        raise combined_error(
            different, f"{found} cannot be continued with other settings; use its own, or another --output_dir"
        )
    logger.info("resuming from %s", found)
    return found


def saved_micro_batching(checkpoint: Path) -> MicroBatching | None:
    """Return how batches were split when a checkpoint was written; None if no batch had been trained on.

    Raises:
        UserError: An earlier version of this program wrote the checkpoint.
    """
    if (checkpoint / _MICRO_BATCHING_UNTIL_0_4).is_file():
        raise UserError(
            f"{checkpoint} was written by an earlier version, whose micro-batches were chosen differently; resume it "
            "with that version, or use another --output_dir"
        )
    path = checkpoint / _MICRO_BATCHING
    return MicroBatching(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def explain_disk_errors(output_dir: Path) -> AbstractContextManager[None]:
    """Return a context that turns an error of the disk that a run writes to into one that says what to do."""

    def advice() -> str:
        newest = next(reversed(whole_checkpoints(output_dir)), None)
        start = "starts from the beginning" if newest is None else f"resumes from {newest.name}"
        return f"run the same command again: it {start}"

    return explain_os_errors(output_dir, "--output_dir", advice, also=(RuntimeError, SafetensorError))


_STEP = re.compile(r"checkpoint-\d+")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
