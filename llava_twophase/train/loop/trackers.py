"""Experiment trackers: started before the LLM is loaded, with one tracker run for a run and its resumed parts."""

from __future__ import annotations

import json
import logging
import os
import secrets
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_twophase.errors import UserError
from llava_twophase.train.loop.artefacts import write_json

logger = logging.getLogger(__name__)

FILE = "tracker.json"


def start_trackers(training: TrainingArguments, folder: Path) -> list[TrainerCallback]:
    """Start or continue the tracker run of a training run; called on rank 0.

    wandb and mlflow get the run whose id ``tracker.json`` holds. HF Trainer's callbacks then use it.

    Args:
        training: Trainer's arguments.
        folder: The run's folder.

    Returns:
        Callbacks for Trainer.

    Raises:
        UserError: wandb cannot be used, because nobody is logged in for example; or TensorBoard's folder cannot be
            written.
    """
    names = training.report_to or []
    runs = _read(folder)
    if "tensorboard" in names:
        # TensorBoard shows the event files of one folder as one run.
        _make_folder(os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "runs")))
    if "wandb" in names:
        runs["wandb"] = os.environ.get("WANDB_RUN_ID") or runs.get("wandb") or secrets.token_hex(4)
        _start_wandb(runs["wandb"], training.run_name)
    if "mlflow" in names and "mlflow" in runs:
        os.environ.setdefault("MLFLOW_RUN_ID", runs["mlflow"])
    if runs:
        write_json(folder / FILE, runs)
    return [_StoreMlflowRun(folder)] if "mlflow" in names else []


def _read(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        logger.warning("%s is damaged; the trackers start new runs", folder / FILE)
        return {}


def _make_folder(path: str) -> None:
    if "://" in path:  # an object store, which TensorBoard writes to itself
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
        reason = "it is read-only"
    except OSError as error:
        writable, reason = False, str(error.strerror)
    if not writable:
        raise UserError(
            f"--report_to tensorboard: TENSORBOARD_LOGGING_DIR {path} cannot be written: {reason}; give another folder"
        )


def _start_wandb(run_id: str, name: str | None) -> None:
    import wandb

    try:
        # As HF Trainer's callback would, which uses a run that is already there.
        project = os.environ.get("WANDB_PROJECT", "huggingface")
        wandb.init(project=project, name=name, id=run_id, resume="allow")
    except Exception as error:  # of several kinds: no login, no network, an invalid key
        raise UserError(
            f"--report_to wandb: {' '.join(str(error).split())}; log in with: wandb login; or set WANDB_MODE=offline, "
            "or use --report_to none"
        ) from None


class _StoreMlflowRun(TrainerCallback):
    """Stores the id of the run that HF Trainer's callback has started, so that a resumed run continues it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        import mlflow  # type: ignore[import-not-found, unused-ignore]

        run = mlflow.active_run()
        if state.is_world_process_zero and run is not None:
            write_json(self._folder / FILE, {**_read(self._folder), "mlflow": run.info.run_id})
