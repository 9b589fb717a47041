"""Stop a run on SIGTERM or SIGUSR1 with a checkpoint, as schedulers announce the end of a job."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_twophase.compat import set_group_timeouts

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
Handler = Callable[[int, FrameType | None], Any] | int | None


class StopOnSignal(TrainerCallback):
    """Writes a checkpoint after the step in which a signal arrived, on any rank, and ends the training.

    Attributes:
        stopped_by: The signal that ended the training; None if it ended otherwise.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self._received = 0
        self._steps_per_epoch = 0
        self._former: dict[int, Handler] = {}
        self._group: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Install the signal handlers; the ranks get a group on the host, so that no step waits for the device.

        From now on, every group waits for other ranks as long as ``--ddp_timeout``.
        """
        if train_dataloader is not None:
            self._steps_per_epoch = -(-len(train_dataloader) // args.gradient_accumulation_steps)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
            set_group_timeouts(args.ddp_timeout_delta)
        self._former = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Stop after this step if a signal arrived, except after the last step, which ends the run anyway."""
        received = self._received_by_any_rank()
        if received and state.global_step < state.max_steps:
            self.stopped_by = received
            logger.warning(
                "received %s: writing a checkpoint after step %d; run the same command again to resume",
                signal.Signals(received).name,
                state.global_step,
            )
            # At the end of an epoch the checkpoint comes after what is due then.
            control.should_save = control.should_save or not self._is_epoch_end(state)
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Within an epoch, do nothing that is due at its end; the resumed run does it."""
        if self.stopped_by is not None:
            control.should_save = self._is_epoch_end(state)
            control.should_evaluate = control.should_evaluate and self._is_epoch_end(state)
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the former signal handlers."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _received_by_any_rank(self) -> int:
        if self._group is None:
            return self._received
        received = torch.tensor(self._received)
        dist.all_reduce(received, op=dist.ReduceOp.MAX, group=self._group)
        return int(received)

    def _is_epoch_end(self, state: TrainerState) -> bool:
        return self._steps_per_epoch > 0 and state.global_step % self._steps_per_epoch == 0


def ignore_signals(worker: int) -> None:
    """Let a data loader's worker ignore the signals, which a scheduler sends to all processes of a job."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
