"""Where a run starts: from a checkpoint, from the beginning, or not at all because it is finished.

Rank 0 decides; the other ranks only check that they see the same files.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from llava_twophase.cache.fingerprint import differences, normalize
from llava_twophase.errors import UserError, combined_error
from llava_twophase.text import counted
from llava_twophase.train.identity import identity_differences
from llava_twophase.train.layout import Layout, describe_change
from llava_twophase.train.loop.agreement import on_all_ranks, on_main_rank
from llava_twophase.train.loop.artefacts import ARTEFACTS, CONFIG, write_json
from llava_twophase.train.loop.checkpoints import (
    FINISHED,
    MARKER,
    CheckpointRecord,
    checkpoint_problems,
    checkpoint_step,
    complete_checkpoints,
    read_record,
)
from llava_twophase.train.loop.checksums import damaged_files, file_checksums, read_checked_json, write_checked_json

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
        finished: The run has ended before; there is nothing to train.
        config_is_damaged: The finished run's ``config.json`` is damaged or missing, and nothing else is.
        checkpoint: The checkpoint to resume from; None to start from the beginning.
        layout: Layout of the run that wrote the checkpoint.
        origin: Layout at that run's start.
    """

    finished: bool = False
    config_is_damaged: bool = False
    checkpoint: Path | None = None
    layout: Layout | None = None
    origin: Layout | None = None


@dataclass(frozen=True)
class _FinishedRun:
    """The content of ``finished.json``.

    Attributes:
        identity: What a command must have in common with the run to be the same one.
        step: Optimizer steps trained.
        steps_per_epoch: Optimizer steps of an epoch.
        resume_from_checkpoint: The run's own flag.
        files: Size and checksum of each artefact.
    """

    identity: dict[str, Any]
    step: int
    steps_per_epoch: int
    resume_from_checkpoint: str | None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def find_start(folder: Path, asked: str | None, identity: dict[str, Any], length: RunLength, layout: Layout) -> Start:
    """Decide where a run starts; the same command run again resumes from its newest checkpoint.

    Args:
        folder: The run's folder.
        asked: ``--resume_from_checkpoint``: a folder, ``True``, ``False`` or None.
        identity: What this run must have in common with the one that wrote a checkpoint.
        length: How long this command trains.
        layout: This run's layout.

    Raises:
        UserError: The folder holds a run with other settings, a damaged checkpoint, or not what was asked for; or a
            rank does not see the checkpoint that rank 0 chose.
    """
    identity = normalize(identity)
    start = on_main_rank(lambda: _find_start(folder, asked, _Command(identity, length, layout)))
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
    _write_record(folder, _FinishedRun(normalize(identity), step, steps_per_epoch, asked))


def restore_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the ``config.json`` of a finished run again.

    Args:
        folder: The run's folder.
        config: As ``llava_config`` returns it.
    """
    write_json(folder / CONFIG, config)
    _write_record(folder, _FinishedRun(**read_checked_json(folder / FINISHED)))
    logger.info("wrote %s", folder / CONFIG)


def _write_record(folder: Path, record: _FinishedRun) -> None:
    record = replace(record, files=file_checksums(folder, [folder / name for name in ARTEFACTS]))
    write_checked_json(folder / FINISHED, asdict(record))


@dataclass(frozen=True)
class _Command:
    """What this command trains.

    Attributes:
        identity: What it must have in common with an earlier run.
        length: How long it trains.
        layout: Its layout.
    """

    identity: dict[str, Any]
    length: RunLength
    layout: Layout


def _find_start(folder: Path, asked: str | None, command: _Command) -> Start:
    wanted = None if asked is None else {"true": "True", "false": "False"}.get(asked.lower(), asked)
    complete = complete_checkpoints(folder)
    record = _read_finished(folder, wanted)
    if record is not None and not (complete and differences(record.identity, command.identity)):  # reported below
        start = _start_of_finished(folder, record, command, bool(complete))
        if start is not None:
            return start
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
    found = _require_continuation(chosen, command)
    written = found.layout
    change = "" if written == command.layout else f"; {describe_change(written, command.layout)}"
    logger.info("resuming from %s%s", chosen, change)
    return Start(checkpoint=chosen, layout=written, origin=found.origin)


def _read_finished(folder: Path, wanted: str | None) -> _FinishedRun | None:
    """Read ``finished.json``; return None without one, or if an earlier checkpoint is asked for."""
    path = folder / FINISHED
    if not path.exists():
        return None
    try:
        record = _FinishedRun(**read_checked_json(path))
    except (UserError, TypeError) as error:
        logger.warning("%s: %s; the artefacts are written again", folder, error)
        return None
    return record if wanted in (None, "True", "False", record.resume_from_checkpoint) else None


def _start_of_finished(folder: Path, record: _FinishedRun, command: _Command, has_checkpoints: bool) -> Start | None:
    """Return where a command starts whose run has ended; None if the checkpoints decide."""
    _require_same(record.identity, command, f"the finished run in {folder}", "the finished run")
    planned = command.length.steps(record.steps_per_epoch)
    if planned < record.step:
        raise UserError(
            f"--output_dir {folder} holds a finished run of {counted(record.step, 'step')}, and this command trains "
            f"{planned}; give another --output_dir"
        )
    if planned > record.step:
        if not has_checkpoints:
            logger.warning("%s has no checkpoint of the finished run; training starts from the beginning", folder)
        return None
    damaged = {name: line for name, stored in record.files.items() for line in damaged_files(folder, {name: stored})}
    if not damaged:
        logger.info(
            "the run in %s is finished after %s: nothing to train, no file was changed",
            *(folder, counted(record.step, "step")),
        )
        return Start(finished=True)
    problem = f"the finished run in {folder} is damaged: {'; '.join(damaged.values())}"
    if set(damaged) == {CONFIG}:
        logger.warning("%s; it is written again, nothing is trained", problem)
        return Start(finished=True, config_is_damaged=True)
    if not has_checkpoints:
        raise UserError(
            f"{problem}; there is no checkpoint to write it again from: restore it from a copy, or train again from "
            f"the beginning after: rm {folder / FINISHED}"
        )
    logger.warning("%s; it is written again from the last checkpoint", problem)
    return None


def _require_no_checkpoint(folder: Path, complete: list[Path]) -> None:
    if complete:
        raise UserError(
            f"--resume_from_checkpoint False: {folder} has {complete[-1].name}; remove the flag to resume from it, "
            f"or start from the beginning in another --output_dir or after: rm -r {folder}"
        )


def _require_complete(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise UserError(f"--resume_from_checkpoint {checkpoint}: there is no such folder; expected True, False or one")
    if not (checkpoint / MARKER).exists():
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


def _require_continuation(checkpoint: Path, command: _Command) -> CheckpointRecord:
    record = read_record(checkpoint)
    _require_same(record.identity, command, str(checkpoint), "the checkpoint")
    planned = command.length.steps(record.steps_per_epoch)
    if checkpoint_step(checkpoint) > planned:
        raise UserError(
            f"{checkpoint} was written after the {planned} steps that this command trains; give another --output_dir, "
            "or more --max_steps or --num_train_epochs"
        )
    return record


def _require_same(found: dict[str, Any], command: _Command, what: str, name: str) -> None:
    different = identity_differences(found, command.identity, name, command.layout)
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
