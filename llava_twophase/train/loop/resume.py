"""Where a run starts: from a checkpoint, from the beginning, or not at all because it is finished.

Rank 0 decides; the other ranks only check that they see the same files.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from llava_twophase.cache.fingerprint import differences, normalize
from llava_twophase.errors import UserError, combined_error
from llava_twophase.train.loop.agreement import on_all_ranks, on_main_rank
from llava_twophase.train.loop.artefacts import write_json
from llava_twophase.train.loop.checkpoints import (
    FINISHED,
    MARKER,
    checkpoint_problems,
    checkpoint_step,
    complete_checkpoints,
    read_record,
)
from llava_twophase.train.loop.checksums import damaged_files, file_checksums
from llava_twophase.train.model.projector import FILE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunLength:
    """How long a command trains.

    Attributes:
        max_steps: ``--max_steps``, at most 0 if epochs decide.
        epochs: ``--num_train_epochs``.
    """

    max_steps: int
    epochs: float

    def steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps, as HF Trainer counts them."""
        return self.max_steps if self.max_steps > 0 else ceil(self.epochs * steps_per_epoch)


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        finished: The run has ended before; there is nothing to do.
        checkpoint: The checkpoint to resume from; None to start from the beginning.
    """

    finished: bool = False
    checkpoint: Path | None = None


def find_start(folder: Path, asked: str | None, identity: dict[str, Any], length: RunLength) -> Start:
    """Decide where a run starts; the same command run again resumes from its newest checkpoint.

    Args:
        folder: The run's folder.
        asked: ``--resume_from_checkpoint``: a folder, ``True``, ``False`` or None.
        identity: What this run must have in common with the one that wrote a checkpoint.
        length: How long this command trains.

    Raises:
        UserError: The folder holds a run with other settings, a damaged checkpoint, or not what was asked for; or a
            rank does not see the checkpoint that rank 0 chose.
    """
    identity = normalize(identity)
    start = on_main_rank(lambda: _find_start(folder, asked, identity, length))
    if start.checkpoint is not None:
        on_all_ranks(lambda: _require_visible(start.checkpoint))
    return start


def write_finished(
    folder: Path, identity: dict[str, Any], step: int, steps_per_epoch: int, asked: str | None = None
) -> None:
    """Record that a run has ended and that its artefacts are written.

    Args:
        folder: The run's folder.
        identity: What a command must have in common with this run to be the same one.
        step: Optimizer steps trained.
        steps_per_epoch: Optimizer steps of an epoch.
        asked: ``--resume_from_checkpoint`` of this run.
    """
    content = {
        "resume_from_checkpoint": asked,
        "identity": normalize(identity),
        "step": step,
        "steps_per_epoch": steps_per_epoch,
        "files": file_checksums(folder, [folder / FILE]),
    }
    write_json(folder / FINISHED, content)


def _find_start(folder: Path, asked: str | None, identity: dict[str, Any], length: RunLength) -> Start:
    wanted = None if asked is None else {"true": "True", "false": "False"}.get(asked.lower(), asked)
    if _is_finished(folder, wanted, identity, length):
        return Start(finished=True)
    complete = complete_checkpoints(folder)
    if wanted == "False":
        _require_no_checkpoint(folder, complete)
        return Start()
    if wanted not in (None, "True"):
        chosen = Path(str(wanted))
        _require_complete(chosen)
    elif complete:
        chosen = complete[-1]
    elif wanted == "True":
        raise UserError(f"--resume_from_checkpoint True: {folder} has no complete checkpoint; use False")
    else:
        return Start()
    _require_undamaged(chosen, [path for path in reversed(complete) if path != chosen])
    _require_continuation(chosen, identity, length)
    logger.info("resuming from %s", chosen)
    return Start(checkpoint=chosen)


def _is_finished(folder: Path, wanted: str | None, identity: dict[str, Any], length: RunLength) -> bool:
    path = folder / FINISHED
    if not path.is_file():
        return False
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, trained, files = record["identity"], record["step"], record["files"]
        planned = length.steps(record["steps_per_epoch"])
        same_start = wanted in (None, "True", "False", record["resume_from_checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s is damaged; the artefacts are written again", path)
        return False
    if not same_start:
        return False  # the user wants to go back to an earlier checkpoint
    if differences(found, identity) and complete_checkpoints(folder):
        return False  # reported for the checkpoint
    _require_same(found, identity, f"the finished run in {folder}", "the finished run")
    problems = damaged_files(folder, files)
    if problems:
        logger.warning("the finished run in %s is damaged: %s; it is written again", folder, "; ".join(problems))
        return False
    if planned < trained:
        raise UserError(
            f"--output_dir {folder} holds a finished run of {trained} steps, and this command trains {planned}; "
            "give another --output_dir"
        )
    if planned == trained:
        logger.info("the run in %s is finished after %d steps: nothing to train, no file was changed", folder, trained)
        return True
    if not complete_checkpoints(folder):
        logger.warning("%s has no checkpoint of the finished run; training starts from the beginning", folder)
    return False


def _require_no_checkpoint(folder: Path, complete: list[Path]) -> None:
    if complete:
        raise UserError(
            f"--resume_from_checkpoint False: {folder} has {complete[-1].name}; remove the flag to resume from it, "
            f"or start from the beginning in another --output_dir or after: rm -r {folder}"
        )


def _require_complete(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise UserError(f"--resume_from_checkpoint {checkpoint}: there is no such folder; expected True, False or one")
    if not (checkpoint / MARKER).is_file():
        raise UserError(f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint: it has no {MARKER}")


def _require_undamaged(checkpoint: Path, others: list[Path]) -> None:
    problems = checkpoint_problems(checkpoint)
    if not problems:
        return
    older = next(
        (
            path
            for path in others
            if checkpoint_step(path) < checkpoint_step(checkpoint) and not checkpoint_problems(path)
        ),
        None,
    )
    if older is None:
        way_out = f"there is no older checkpoint; to start from the beginning, delete it: rm -r {checkpoint}"
    else:
        way_out = (
            f"the older {older.name} is complete; to resume from it, add --resume_from_checkpoint {older}, or delete "
            f"the damaged one and run the same command again: rm -r {checkpoint}"
        )
    raise UserError(f"{checkpoint} is damaged: {'; '.join(problems)}; {way_out}")


def _require_continuation(checkpoint: Path, identity: dict[str, Any], length: RunLength) -> None:
    record = read_record(checkpoint)
    _require_same(record.identity, identity, str(checkpoint), "the checkpoint")
    planned = length.steps(record.steps_per_epoch)
    if checkpoint_step(checkpoint) > planned:
        raise UserError(
            f"{checkpoint} was written after the {planned} steps that this command trains; give another --output_dir, "
            "or more --max_steps or --num_train_epochs"
        )


def _require_same(found: dict[str, Any], identity: dict[str, Any], what: str, name: str) -> None:
    different = differences(found, identity, names=(name, "this run"))
    if different:
        raise combined_error(
            different, f"{what} cannot be continued with other settings; use its own, or another --output_dir"
        )


def _require_visible(checkpoint: Path | None) -> None:
    assert checkpoint is not None
    problems = checkpoint_problems(checkpoint, content=False)
    if problems:
        raise UserError(
            f"{checkpoint}, which rank 0 resumes from, is not the same here: {'; '.join(problems)}; --output_dir must "
            "be on a file system that all machines share"
        )
