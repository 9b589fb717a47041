"""Phase two's run, from checked arguments to ``mm_projector.bin``; reads as the order of its steps."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from llava_twophase.errors import UserError
from llava_twophase.train.arguments import Arguments
from llava_twophase.train.data.collator import collate
from llava_twophase.train.data.dataset import CaptionDataset
from llava_twophase.train.loop.artefacts import llava_config, write_artefacts
from llava_twophase.train.loop.checkpoints import (
    CheckpointKeeper,
    checkpoint_to_resume,
    explain_disk_errors,
    saved_micro_batching,
)
from llava_twophase.train.loop.generated_captions import CaptionSamples
from llava_twophase.train.loop.trainer import ProjectorTrainer
from llava_twophase.train.model.frozen_llm import FrozenLLM
from llava_twophase.train.model.llava import LlavaProjectorModel
from llava_twophase.train.model.load_llm import gathered, load_llm
from llava_twophase.train.preflight import Inputs, check_inputs, run_identity

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = (
    "lower --per_device_train_batch_size and raise --gradient_accumulation_steps by as much, spread the LLM with "
    "--deepspeed pipelines/zero3.json, or quantise it with --bits 4"
)


def run(arguments: Arguments) -> int:
    """Train the projector and write its artefacts into ``--output_dir``.

    Args:
        arguments: The checked command line.

    Returns:
        0; whatever goes wrong is raised.

    Raises:
        UserError: Bad input, before the LLM is loaded wherever that can be known.
    """
    _train(arguments)
    if torch.distributed.is_initialized():
        # A group that still stands when the interpreter ends can abort a rank that has done its work; engines hold it.
        gc.collect()
        torch.distributed.destroy_process_group()
    return 0


def _train(arguments: Arguments) -> None:
    training = arguments.training
    set_seed(training.seed)
    inputs = check_inputs(arguments)
    identity = run_identity(arguments, inputs)
    folder = Path(str(training.output_dir))
    checkpoint = checkpoint_to_resume(folder, training.resume_from_checkpoint, identity)
    with explain_disk_errors(folder):
        try:
            model = _model(arguments, inputs, checkpoint)
            trainer = _trainer(arguments, inputs, model, identity)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory: {error}; {_OUT_OF_MEMORY}") from None
        trainer.save_state()
        with gathered(inputs.projector):
            if trainer.is_world_process_zero():
                config = llava_config(inputs.config, arguments, inputs.width)
                fingerprint = inputs.source.fingerprint
                logger.info("wrote %s", write_artefacts(folder, inputs.projector, config, arguments, fingerprint))


def _model(arguments: Arguments, inputs: Inputs, checkpoint: Path | None) -> LlavaProjectorModel:
    training, template = arguments.training, inputs.template
    given = arguments.micro_batching
    saved = saved_micro_batching(checkpoint) if checkpoint is not None and given == (None, None) else None
    frozen = FrozenLLM(load_llm(arguments), template.image_position, *given)
    if saved is not None:
        frozen.micro_batching = saved
    model = LlavaProjectorModel(frozen, inputs.projector, template.image_tokens, inputs.source.encode)
    model.accepts_loss_kwargs = training.average_tokens_across_devices
    if training.torch_compile:
        frozen.compile(backend=training.torch_compile_backend, mode=training.torch_compile_mode)
    return model


def _trainer(
    arguments: Arguments, inputs: Inputs, model: LlavaProjectorModel, identity: dict[str, Any]
) -> ProjectorTrainer:
    training, template, source = arguments.training, inputs.template, inputs.source
    keeper = CheckpointKeeper(identity, training.save_total_limit, model.frozen)
    truncated = inputs.rows.truncated
    if truncated:
        logger.warning("%d captions are truncated at --model_max_length %d", truncated, training.model_max_length)
    weights = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%d records, %d held out, %d trainable weights", len(inputs.records), len(inputs.eval_records), weights)
    return ProjectorTrainer(
        model,
        arguments.for_trainer(),
        data_collator=collate,
        train_dataset=CaptionDataset(inputs.records, template, source),
        eval_dataset=CaptionDataset(inputs.eval_records, template, source) if inputs.eval_records else None,
        callbacks=[keeper, *_samples(arguments, inputs, model)],
    )


def _samples(arguments: Arguments, inputs: Inputs, model: LlavaProjectorModel) -> list[CaptionSamples]:
    data = arguments.data
    if not data.sample_captions:
        return []
    records = inputs.eval_records[: data.sample_captions]
    folder = Path(str(arguments.training.output_dir))
    return [CaptionSamples(model, inputs.template, inputs.tokenizer, records, inputs.source, folder)]
