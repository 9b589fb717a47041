"""The lines of a training log: one readable line for each log, in place of HF Trainer's printed dicts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

logger = logging.getLogger(__name__)

# HF Trainer logs these beside the ones below; a reader of the line does not need them.
_NOT_SHOWN = {
    "epoch", "total_flos", "train_loss", "train_samples_per_second", "train_steps_per_second", "eval_steps_per_second",
}  # fmt: skip


def use_log_lines(trainer: Trainer) -> None:
    """Let a trainer write log lines by ``logging``, and its progress bar without the logged values."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_ProgressBar)
    trainer.add_callback(_LogLines)


def log_line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """Return what HF Trainer logs as one line.

    Args:
        logs: Names and values, such as ``{"loss": 5.6, "learning_rate": 1e-3, "epoch": 0.5}``; rates as
            ``metrics.Meter.report`` returns them.
        step: The optimizer step.
        steps: All steps of the run.
    """
    parts = [_PARTS[name](value) for name, value in logs.items() if name in _PARTS]
    parts += [f"{name} {value}" for name, value in logs.items() if name not in _PARTS and name not in _NOT_SHOWN]
    epoch = f" (epoch {logs['epoch']:.2f})" if "epoch" in logs else ""
    return f"step {step} of {steps}{epoch}: {', '.join(parts)}"


class _LogLines(TrainerCallback):
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            logger.info("%s", log_line(logs, state.global_step, state.max_steps))


class _ProgressBar(ProgressCallback):
    def on_log(self, *_: Any, **__: Any) -> None:
        """Leave the values to the log line."""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


_PARTS: dict[str, Callable[[Any], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "eval_loss": lambda value: f"eval loss {value:.4f}",
    "eval_runtime": lambda value: f"evaluated in {_time(value)}",
    "eval_samples_per_second": lambda value: f"{_number(value)} samples/s",
    "train_runtime": lambda value: f"finished, {_time(value)} in this process",
    "grad_norm": lambda value: f"gradient norm {_number(value)}",
    "learning_rate": lambda value: f"learning rate {value:.3g}",
    "samples_per_second": lambda value: f"{_number(value)} samples/s",
    "tokens_per_second": lambda value: f"{_number(value)} tokens/s",
    "tflops_per_device": lambda value: f"{_number(value)} TFLOP/s",
    "data_wait_percent": lambda value: f"data wait {value:.1f} %",
    "memory_gb": lambda value: f"{value:.1f} GB",
    "eta_seconds": lambda value: f"{_time(value)} left",
}
