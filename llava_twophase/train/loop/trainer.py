"""HF Trainer with LLaVA's sample order, rates in its log, and checks of the loss and of the first gradients."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_twophase.constants import IGNORE_INDEX
from llava_twophase.cpu import CpuMeter
from llava_twophase.errors import UserError
from llava_twophase.train.arguments import ProjectorTrainingArguments
from llava_twophase.train.data.dataset import CaptionDataset
from llava_twophase.train.data.loss_weights import LossWeights
from llava_twophase.train.data.sampler import EpochSampler
from llava_twophase.train.layout import Layout
from llava_twophase.train.loop.announce import AnnounceOrder
from llava_twophase.train.loop.interruption import ignore_signals
from llava_twophase.train.loop.log_lines import use_log_lines
from llava_twophase.train.loop.metrics import GradientProbe, Meter, StepFlops
from llava_twophase.train.model.llava import LlavaProjectorModel

logger = logging.getLogger(__name__)

# Another program may take the CPU at any time, so each part of a run of this length is judged on its own.
_CPU_SECONDS = 120.0


class ProjectorTrainer(Trainer):
    """Trains the projector. The loss is the mean of each device's batch, averaged over devices, as in LLaVA.

    Args:
        model: The model.
        args: Further arguments of ``Trainer``.
        origin: The layout at the run's start, which decides the samples of each step and their weights in the loss.
        kwargs: Further arguments of ``Trainer``.
    """

    def __init__(self, model: LlavaProjectorModel, *args: Any, origin: Layout | None = None, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        use_log_lines(self)
        self._layout = Layout.of(self.args)
        self._origin = origin or self._layout
        self._weights: LossWeights | None = None
        self._projector_model = model
        self._flops = StepFlops.of(model.llm)
        self._meter = Meter()
        self._checked = False
        self._cpu: CpuMeter | None = CpuMeter()
        self._waited = 0.0  # seconds without data since the CPU meter was made

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's share of the data loader, in LLaVA's order."""
        args = cast(ProjectorTrainingArguments, self.args)
        assert isinstance(self.train_dataset, CaptionDataset)
        order, drop_last = self._order(self.train_dataset)
        self.add_callback(_SetEpoch(order))
        self.add_callback(_StopAtLastStep())
        prefetching = self.train_dataset.prefetch(
            cast(Any, self.data_collator),
            batch_size=args.train_batch_size,
            batches_in_use=args.gradient_accumulation_steps,
            device=args.device,
        )
        if prefetching is not None:
            if prefetching.is_remote:
                self.add_callback(AnnounceOrder(prefetching, order, args.world_size))
            loader: DataLoader[Any] = DataLoader(
                prefetching,
                batch_size=args.train_batch_size,
                sampler=order,
                collate_fn=_unchanged,
                drop_last=drop_last,
            )
            prepared: DataLoader[Any] = self.accelerator.prepare(loader)
            return prepared
        loader = DataLoader(
            self.train_dataset,
            batch_size=args.train_batch_size,
            sampler=order,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            drop_last=drop_last,
        )
        prepared = self.accelerator.prepare(loader)
        return prepared

    def _order(self, dataset: CaptionDataset) -> tuple[EpochSampler, bool]:
        """Return the order of samples, and whether the loader drops an incomplete batch."""
        args = cast(ProjectorTrainingArguments, self.args)
        origin, size = self._origin, len(dataset)
        samples, drop_last = size, args.dataloader_drop_last
        if not self._layout.splits_batches_like(origin):
            # The samples that the first layout adds or drops are part of the order.
            samples, drop_last = origin.samples_per_epoch(size, drop_last), False
            self._weights = LossWeights(origin, self._layout, args.process_index, samples)
        return sample_order(args, size, dataset.lengths, origin, samples), drop_last

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Fetch the micro-batches of one step and measure the wait; none if the run resumed after its last step."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        started = time.perf_counter()
        if self._weights is None:
            batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        else:
            used = self._weights.without_surplus(epoch_iterator, self.state.global_step)
            found, items = super().get_batch_samples(used, num_batches, device)
            if not self.args.average_tokens_across_devices:
                found = self._weights.weigh(found, self.state.global_step, self.accelerator.gather)
            batches = found, items
        self._meter.waited += time.perf_counter() - started
        self._meter.steps += 1
        return batches

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run one micro-batch and, if it is the first one, check its loss and gradients.

        Raises:
            UserError: The first loss or gradient is not finite, or the gradients are zero.
        """
        self._count(inputs)
        if self._checked or not (inputs["labels"] != IGNORE_INDEX).any():
            return super().training_step(model, inputs, num_items_in_batch)
        probe = GradientProbe(self._projector_model.mm_projector)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            probe.close()
        self._checked = True
        require_learning(loss.item(), probe)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the rates since the last log, and end the run if the loss is not finite.

        Raises:
            UserError: The loss is not finite. Checkpoints are kept.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise UserError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}; try --bf16 True instead of fp16, or "
                    "a lower --learning_rate, with another --output_dir; the last checkpoint is unchanged"
                )
            steps_left = self.state.max_steps - self.state.global_step
            logs |= self._meter.report(self.args.world_size, self.args.device, steps_left)
            self._warn_if_cpu_is_starved()
            self._meter = Meter()
        super().log(logs, start_time)

    def _warn_if_cpu_is_starved(self) -> None:
        if self._cpu is None:
            return
        self._waited += self._meter.waited
        usage = self._cpu.usage(idle=self._waited, threads=torch.get_num_threads())
        advice = usage.advice("--dataloader_num_workers" if self.args.dataloader_num_workers else None)
        if advice is not None:
            logger.warning("%s", advice)
            self._cpu = None  # once in a run
        elif usage.wall > _CPU_SECONDS:
            self._cpu, self._waited = CpuMeter(), 0.0

    def _count(self, inputs: dict[str, Any]) -> None:
        samples, length = inputs["labels"].shape
        positions = length - 1 + self._projector_model.image_tokens
        self._meter.samples += samples
        self._meter.tokens += samples * positions
        self._meter.flops += self._flops.count(samples, positions, length - self._projector_model.image_position)


def sample_order(
    training: ProjectorTrainingArguments,
    size: int,
    lengths: Callable[[], np.ndarray],
    layout: Layout,
    samples: int | None = None,
) -> EpochSampler:
    """Return the order of a run's samples over all ranks.

    Args:
        training: The run's arguments.
        size: Number of samples.
        lengths: Returns the number of words of each sample; called for ``--group_by_modality_length`` only.
        layout: The layout at the run's start.
        samples: Samples of an epoch; None for `size`.
    """
    return EpochSampler(
        size,
        seed=training.seed if training.data_seed is None else training.data_seed,
        world_size=layout.world_size,
        lengths=lengths() if training.group_by_modality_length else None,
        batch_size=layout.batch_size,
        groups=layout.world_size * layout.accumulation,
        samples=samples,
    )


class _SetEpoch(TrainerCallback):
    # Accelerate's loaders tell their sampler the epoch, except through the two wrappers of a loader that is a rank's
    # share and skips the samples before a resume: it would continue in the first epoch's order.

    def __init__(self, order: EpochSampler) -> None:
        self._order = order

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._order.set_epoch(int(state.epoch or 0))


class _StopAtLastStep(TrainerCallback):
    # HF Trainer looks at --max_steps only after a step, so a run that resumes from its last checkpoint, in order to
    # write the artefacts, would train one step too many.

    def __init__(self) -> None:
        self._resumed_at_end = False

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self._resumed_at_end = state.global_step >= state.max_steps
        control.should_training_stop = control.should_training_stop or self._resumed_at_end
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self._resumed_at_end:
            control.should_log = control.should_evaluate = control.should_save = False
        return control


def _unchanged(batch: Any) -> Any:
    return batch


def require_learning(loss: float, probe: GradientProbe) -> None:
    """Check the first step of a run.

    Args:
        loss: Loss of the micro-batch.
        probe: The probe of its gradients.

    Raises:
        UserError: The loss or a gradient is not finite, or there is no gradient.
    """
    if not math.isfinite(loss):
        raise UserError(f"the first loss is {loss}; nothing was trained: check the LLM and the cache")
    broken = {name: value for name, value in probe.largest.items() if not math.isfinite(value)}
    if broken:
        raise UserError(f"the first gradients of {sorted(broken)} are not finite; try --bf16 True instead of fp16")
    if len(probe.largest) < probe.expected or not any(probe.largest.values()):
        raise UserError(f"the projector got no gradient at the first step ({probe.largest}); it would learn nothing")
