"""The arguments of a training run: the flags of ``flags.py`` with those of HF Trainer, and what follows from them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from llava_twophase.compat import deepspeed_config
from llava_twophase.train.flags import DataArguments, ModelArguments, TrainingFlags, plain

logger = logging.getLogger(__name__)


@dataclass
class ProjectorTrainingArguments(TrainingFlags, TrainingArguments):
    """HF Trainer's arguments with LLaVA's defaults and old spellings, and this project's own flags."""

    def __post_init__(self) -> None:
        """Translate old spellings before HF's own checks."""
        if self.warmup_ratio:
            self.warmup_steps = self.warmup_ratio
        if self.activation_checkpointing is None:
            # transformers 5 renamed the flag and warns about the name in LLaVA's recipe.
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        if self.mm_projector_lr is not None:
            self.learning_rate = self.mm_projector_lr
        if not torch.accelerator.is_available() and not self.use_cpu:
            if self.plan in (None, "here", "True"):
                logger.warning("no accelerator was found; training runs on the CPU")
            self.use_cpu = True
        if self.tf32 and not torch.cuda.is_available():
            logger.warning("--tf32 True is ignored: there is no CUDA device")
            self.tf32 = None
        super().__post_init__()  # type: ignore[no-untyped-call]
        config = deepspeed_config(self)
        if config is not None:
            # LLaVA's own zero2.json does not set it, and DeepSpeed would then accumulate gradients in bf16.
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
            # Nor this. LLaVA parity: its DeepSpeed did not clip then; the default of DeepSpeed 0.19 is 1.0.
            config.setdefault("gradient_clipping", 0.0)


@dataclass(frozen=True)
class Arguments:
    """All arguments of a run. Nothing changes them after parsing.

    Attributes:
        model: Flags of the LLM, the tower and the projector.
        data: Flags of the records and their features.
        training: HF Trainer's flags with LLaVA's defaults.
        given: The flags as typed, without dashes.
    """

    model: ModelArguments
    data: DataArguments
    training: ProjectorTrainingArguments
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen LLM's weights."""
        if self.training.bf16:
            return torch.bfloat16
        return torch.float16 if self.training.fp16 else torch.float32

    @property
    def tower_dtypes(self) -> list[torch.dtype]:
        """The compute dtype of each on-the-fly tower."""
        names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        # LLaVA parity: its tower runs in fp16 even in an fp32 run.
        given = self.model.compute_dtype or ["bf16" if self.training.bf16 else "fp16"]
        found = [names[name] for name in given]
        return found * len(self.model.vision_tower) if len(found) == 1 else found

    @property
    def micro_batching(self) -> tuple[int | None, int | None]:
        """``--micro_batch_size`` and ``--recompute``; None where the choice depends on free memory."""
        samples = self.training.micro_batch_size
        recompute = self.training.recompute
        return None if samples == "auto" else int(samples), None if recompute == "auto" else int(recompute)

    def to_dict(self) -> dict[str, Any]:
        """Return the flags as typed and all values with defaults, ready for JSON; a list of one value is the value."""
        return {
            "given": dict(self.given),
            "model": {name: plain(value) for name, value in asdict(self.model).items()},
            "data": {name: plain(value) for name, value in asdict(self.data).items()},
            "training": self.training.to_dict(),  # type: ignore[no-untyped-call]
        }

    def for_trainer(self) -> ProjectorTrainingArguments:
        """Return a copy for HF Trainer, without what this project does in its place.

        ``CheckpointKeeper`` removes old checkpoints, Liger kernels are applied to the LLM when it is loaded, and
        ``StopOnSignal`` writes a checkpoint on SIGTERM.
        """
        training = copy.copy(self.training)
        training.save_total_limit = None
        training.use_liger_kernel = False
        training.enable_jit_checkpoint = False
        return training
