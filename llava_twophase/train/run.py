"""A training run, from checked arguments to ``mm_projector.bin``, in the order of its steps."""

from __future__ import annotations

import gc
import logging
from contextlib import closing
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback

from llava_twophase.compat import wait_for_torchrun
from llava_twophase.errors import UserError
from llava_twophase.text import agree, counted
from llava_twophase.train.arguments import Arguments, ProjectorTrainingArguments
from llava_twophase.train.data.collator import collate
from llava_twophase.train.data.dataset import CaptionDataset
from llava_twophase.train.environment import output_folder
from llava_twophase.train.flag_checks import flag_hints
from llava_twophase.train.identity import run_identity
from llava_twophase.train.layout import Layout
from llava_twophase.train.loop.agreement import explain_lost_ranks, on_all_ranks, on_main_rank
from llava_twophase.train.loop.artefacts import llava_config, write_artefacts, write_held_out
from llava_twophase.train.loop.checkpoints import CheckpointKeeper, explain_disk_errors, saved_micro_batching
from llava_twophase.train.loop.generated_captions import CaptionSamples
from llava_twophase.train.loop.interruption import StopOnSignal
from llava_twophase.train.loop.optimizer_state import load_portably, require_portable
from llava_twophase.train.loop.output_lock import output_lock
from llava_twophase.train.loop.resume import RunLength, find_start, restore_config, write_finished
from llava_twophase.train.loop.trackers import start_trackers
from llava_twophase.train.loop.trainer import ProjectorTrainer
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.llava import LlavaProjectorModel
from llava_twophase.train.model.load_llm import gathered, load_llm
from llava_twophase.train.plan.show import show_plan
from llava_twophase.train.preflight import TrainingInputs, prepare_inputs
from llava_twophase.train.stage_2 import warn_about_stage_2

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = (
    "lower --per_device_train_batch_size and raise --gradient_accumulation_steps by the same factor, spread the LLM "
    "with --deepspeed pipelines/zero3.json, or quantise it with --bits 4"
)


def run(arguments: Arguments) -> int:
    """Train the projector and write its artefacts into ``--output_dir``.

    Args:
        arguments: The checked command line.

    Returns:
        0 if the run is finished; 128 + n if signal n interrupted it after a checkpoint was written. With ``--plan``, 0
        if the run fits in memory, else 1.

    Raises:
        UserError: Bad input, before the LLM is loaded wherever that can be known.
    """
    if arguments.training.plan is not None:
        code = show_plan(arguments) if arguments.training.process_index == 0 else 0
        _leave_process_group()
        return code
    folder = output_folder(arguments)
    inputs = on_all_ranks(lambda: prepare_inputs(arguments))
    with (
        output_lock(folder),
        explain_disk_errors(folder),
        explain_lost_ranks(arguments.training.ddp_timeout),
        closing(inputs.source),
    ):
        signal_number = _train(arguments, inputs, folder)
    _leave_process_group()
    if signal_number is not None:
        return 128 + signal_number
    wait_for_torchrun()
    return 0


def _train(arguments: Arguments, inputs: TrainingInputs, folder: Path) -> int | None:
    """Train unless the run is finished; return the signal that interrupted it, if one did."""
    training, identity = arguments.training, run_identity(arguments, inputs)
    length = RunLength(training.max_steps, training.num_train_epochs)
    layout = Layout.of(training)
    start = find_start(folder, training.resume_from_checkpoint, identity, length, layout)
    config = llava_config(inputs.config, arguments, inputs.spec.tower_width, inputs.projector_record)
    if start.finished:
        if start.config_is_damaged:
            on_main_rank(lambda: restore_config(folder, config))
        return None
    require_portable(start.checkpoint, start.layout, training)
    _log_advice(arguments)
    if arguments.data.holds_out:
        on_main_rank(lambda: write_held_out(folder, inputs.eval_records))
    trainer_arguments = arguments.for_trainer()
    trackers = on_main_rank(lambda: start_trackers(trainer_arguments, folder))
    try:
        model = _build_model(arguments, inputs, start.checkpoint if start.layout == layout else None)
        keeper = CheckpointKeeper(identity, training.save_total_limit, layout, start.origin, model.frozen)
        stopper = StopOnSignal()
        callbacks = [keeper, stopper, *trackers, *_caption_samples(arguments, inputs, model)]
        trainer = _build_trainer(trainer_arguments, inputs, model, callbacks, start.origin)
        load_portably(trainer, start.checkpoint, start.layout)
        with logging_redirect_tqdm():  # log lines above the progress bar, where there is one
            trainer.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: {error}; {_OUT_OF_MEMORY}") from None
    if stopper.stopped_by is not None:
        return stopper.stopped_by
    trainer.save_state()
    with gathered(inputs.projector):
        if trainer.is_world_process_zero():
            path = write_artefacts(
                folder,
                inputs.projector,
                config,
                arguments,
                image_tokens=inputs.template.image_tokens,
                features=inputs.source.fingerprint,
            )
            write_finished(
                folder,
                identity,
                step=trainer.state.global_step,
                steps_per_epoch=keeper.steps_per_epoch,
                asked=training.resume_from_checkpoint,
            )
            logger.info("wrote %s", path)
    return None


def _log_advice(arguments: Arguments) -> None:
    for hint in flag_hints(arguments):
        logger.info(hint)
    warn_about_stage_2(arguments)


def _build_model(arguments: Arguments, inputs: TrainingInputs, checkpoint: Path | None) -> LlavaProjectorModel:
    training, template = arguments.training, inputs.template
    saved = None if checkpoint is None else saved_micro_batching(checkpoint)
    samples, checkpoint_every = arguments.micro_batching
    frozen = FrozenLLM(
        load_llm(arguments),
        image_position=template.image_position,
        micro_batch_size=None if samples is None else min(samples, training.per_device_train_batch_size),
        checkpoint_every=checkpoint_every,
        longest=inputs.rows.longest,
    )
    if saved is not None:
        frozen.resume_with(saved)
    model = LlavaProjectorModel(frozen, inputs.projector, template.image_tokens, inputs.source.encode)
    model.accepts_loss_kwargs = training.average_tokens_across_devices
    if training.torch_compile:
        frozen.compile(backend=training.torch_compile_backend, mode=training.torch_compile_mode)
    return model


def _build_trainer(
    training: ProjectorTrainingArguments,
    inputs: TrainingInputs,
    model: LlavaProjectorModel,
    callbacks: list[TrainerCallback],
    origin: Layout | None,
) -> ProjectorTrainer:
    template, source = inputs.template, inputs.source
    truncated = inputs.rows.truncated
    if truncated:
        verb = agree(truncated, "is", "are")
        logger.warning(
            "%s %s truncated at --model_max_length %d", counted(truncated, "caption"), verb, training.model_max_length
        )
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    held_out = f"{len(inputs.eval_records):,} held out"
    records, trained = counted(len(inputs.records), "record"), counted(weights, "trainable weight")
    logger.info("%s, %s, %s", records, held_out, trained)
    return ProjectorTrainer(
        model,
        training,
        data_collator=collate,
        train_dataset=CaptionDataset(inputs.records, template, source),
        eval_dataset=CaptionDataset(inputs.eval_records, template, source) if inputs.eval_records else None,
        callbacks=callbacks,
        origin=origin,
    )


def _caption_samples(arguments: Arguments, inputs: TrainingInputs, model: LlavaProjectorModel) -> list[TrainerCallback]:
    data = arguments.data
    if not data.sample_captions:
        return []
    return [
        CaptionSamples(
            model=model,
            template=inputs.template,
            tokenizer=inputs.tokenizer,
            records=inputs.eval_records[: data.sample_captions],
            source=inputs.source,
            folder=output_folder(arguments),
        )
    ]


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        # Engines hold the group; one that exists when the interpreter ends can abort a rank that has done its work.
        gc.collect()
        torch.distributed.destroy_process_group()
