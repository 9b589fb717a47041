"""LLaVA's flags, old and new spellings, and what of them concerns stage 1; knows nothing of models or data."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from llava_twophase.errors import UserError, combined_error
from llava_twophase.train.data.conversation import TEMPLATES

logger = logging.getLogger(__name__)

EXAMPLE = """\
example, LLaVA's recipe from a feature cache:
  deepspeed pipelines/train_projector.py --deepspeed pipelines/zero2.json \\
      --model_name_or_path lmsys/vicuna-13b-v1.5 --version plain \\
      --data_path blip_laion_cc_sbu_558k.json --feature_cache caches/clip-l-336 \\
      --vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu \\
      --tune_mm_mlp_adapter True --bf16 True --output_dir checkpoints/llava-v1.5-13b-pretrain \\
      --num_train_epochs 1 --per_device_train_batch_size 32 --learning_rate 1e-3 --weight_decay 0. \\
      --warmup_ratio 0.03 --lr_scheduler_type cosine --model_max_length 2048
"""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the example's lines as they are."""


def _flag(default: Any, text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": text, **extra})


@dataclass
class ModelArguments:
    """The LLM, the tower and the projector between them."""

    model_name_or_path: str = field(metadata={"help": "base LLM: hub id or local folder"})
    vision_tower: str = field(metadata={"help": "vision tower: hub id or local folder; not loaded with a cache"})
    version: str = _flag("plain", "conversation template; stage 1 has one: plain")
    mm_projector_type: str = _flag("linear", "linear, or mlp2x_gelu for LLaVA-1.5")
    tune_mm_mlp_adapter: bool = _flag(False, "must be True: stage 1 trains the projector alone")
    pretrain_mm_mlp_adapter: str | None = _flag(None, "projector file to start from")
    mm_vision_select_layer: int = _flag(-2, "hidden state of the tower")
    mm_vision_select_feature: str = _flag("patch", "patch, or cls_patch to keep the CLS token")
    mm_patch_merge_type: str = _flag("flat", "stage 1 has one: flat")
    mm_use_im_start_end: bool = _flag(False, "must be False: it needs trained embeddings")
    mm_use_im_patch_token: bool = _flag(False, "must be False: it needs trained embeddings")
    compute_dtype: str | None = _flag(
        None, "on-the-fly tower: bf16, fp16 or fp32 (default: bf16 with --bf16, else fp16, as LLaVA)"
    )
    attn_implementation: str | None = _flag(None, "the LLM's attention: sdpa, flash_attention_2, eager")
    freeze_backbone: bool = _flag(False, "accepted: the LLM is always frozen here")
    mpt_attn_impl: str | None = _flag(None, "accepted and ignored: for MPT models only")


@dataclass
class DataArguments:
    """Records, and where their features come from."""

    data_path: str = field(metadata={"help": "records: LLaVA's JSON list or JSON lines"})
    image_folder: str | None = _flag(None, "folder of the images; needed without --feature_cache")
    feature_cache: str | None = _flag(None, "cache that phase one made; without it the tower runs in every step")
    image_aspect_ratio: str = _flag("square", "square or pad")
    eval_data_path: str | None = _flag(None, "records to evaluate on; needs --eval_strategy")
    eval_fraction: float = _flag(0.0, "part of --data_path to hold out and evaluate on instead")
    sample_captions: int = _flag(0, "captions to write at each evaluation, with thumbnails, as HTML and to the tracker")
    drop_quarantined: bool = _flag(
        False, "leave out records whose image is in the cache's quarantine.jsonl, instead of refusing to start"
    )
    drop_unk_tokens: bool = _flag(
        False, "leave <unk> out of captions: what LLaVA's padding mask does by accident, for exact comparisons with it"
    )
    lazy_preprocess: bool = _flag(True, "accepted: samples are always made when needed")
    is_multimodal: bool = _flag(True, "accepted: every record has an image here")


@dataclass
class ProjectorTrainingArguments(TrainingArguments):
    """HF Trainer's arguments with LLaVA's defaults, old spellings and own flags."""

    eval_strategy: str = _flag("no", "no, steps or epoch", aliases=["--evaluation_strategy"])
    warmup_ratio: float = _flag(0.0, "part of all steps for warm-up; the same as a fraction in --warmup_steps")
    optim: str = _flag("adamw_torch", "optimizer, as in HF Trainer")
    average_tokens_across_devices: bool = _flag(
        False, "False: LLaVA's loss, the mean of each device's batch; True: the mean over the tokens of the whole batch"
    )
    logging_nan_inf_filter: bool = _flag(False, "True would hide a loss that is not finite, which ends a run here")
    remove_unused_columns: bool = _flag(False, "has no effect: samples hold only what the model takes")
    model_max_length: int = _flag(2048, "longest sequence, the image's positions included")
    group_by_modality_length: bool = _flag(False, "batches of similar text length, as LLaVA groups them")
    micro_batch_size: str = _flag(
        "auto", "samples that go through the LLM at once; auto: by memory. Neither this nor --recompute changes a loss"
    )
    recompute: str = _flag(
        "auto",
        "activations to recompute: 0 none, k those of every k-th layer; auto: none while memory lasts, also with "
        "--gradient_checkpointing True",
    )
    mm_projector_lr: float | None = _flag(None, "learning rate of the projector; overrides --learning_rate")
    freeze_mm_mlp_adapter: bool = _flag(False, "must be False: nothing would be trained")
    cache_dir: str | None = _flag(None, "where hub downloads are kept")
    bits: int = _flag(16, "of the frozen LLM: 16, or 8 or 4 with bitsandbytes on a GPU")
    double_quant: bool = _flag(True, "only with --bits 4")
    quant_type: str = _flag("nf4", "only with --bits 4")
    lora_enable: bool = _flag(False, "must be False: stage 1 trains the projector alone")
    lora_r: int = _flag(64, "accepted: has no effect without LoRA")
    lora_alpha: int = _flag(16, "accepted: has no effect without LoRA")
    lora_dropout: float = _flag(0.05, "accepted: has no effect without LoRA")
    lora_weight_path: str = _flag("", "accepted: has no effect without LoRA")
    lora_bias: str = _flag("none", "accepted: has no effect without LoRA")

    def __post_init__(self) -> None:
        """Translate old spellings before HF's own checks."""
        if self.warmup_ratio:
            self.warmup_steps = self.warmup_ratio
        if self.activation_checkpointing is None:
            # transformers 5 renamed it, and warns of the name that LLaVA's recipe has.
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        if self.mm_projector_lr is not None:
            self.learning_rate = self.mm_projector_lr
        if not torch.accelerator.is_available() and not self.use_cpu:
            logger.warning("no accelerator is there: training on the CPU")
            self.use_cpu = True
        if self.tf32 and not torch.cuda.is_available():
            logger.warning("--tf32 True is ignored: there is no CUDA device")
            self.tf32 = None
        super().__post_init__()
        if self.deepspeed_plugin is not None:
            # LLaVA's own zero2.json says nothing of it, and DeepSpeed would then add micro-batches up in bf16.
            self.deepspeed_plugin.deepspeed_config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


@dataclass
class Arguments:
    """All of a run's arguments."""

    model: ModelArguments
    data: DataArguments
    training: ProjectorTrainingArguments

    @property
    def dtype(self) -> torch.dtype:
        """The run's dtype: of the frozen LLM, and of the projector's file."""
        if self.training.bf16:
            return torch.bfloat16
        return torch.float16 if self.training.fp16 else torch.float32

    def resolved(self) -> dict[str, Any]:
        """Return every argument as JSON, defaults included, for the run's folder."""
        training = self.training.to_dict()
        return {"model": asdict(self.model), "data": asdict(self.data), "training": training}

    @property
    def cut(self) -> tuple[int | None, int | None]:
        """``--micro_batch_size`` and ``--recompute``, None where memory is to choose."""
        given = self.training.micro_batch_size, self.training.recompute
        rows, recompute = (None if text == "auto" else int(text) for text in given)
        return rows, recompute

    @property
    def tower_dtype(self) -> torch.dtype:
        """The on-the-fly tower's compute dtype."""
        names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        if self.model.compute_dtype is None:
            # LLaVA parity: its tower runs in fp16 even in an fp32 run.
            return torch.bfloat16 if self.training.bf16 else torch.float16
        return names[self.model.compute_dtype]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parse and check a command line.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.

    Returns:
        The arguments; torch's process group and device are set up as TrainingArguments does.

    Raises:
        UserError: Flags that stage 1 cannot honour, all of them with the reason.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, ProjectorTrainingArguments),  # type: ignore[arg-type]
        prog="llava-train-projector",
        description="Phase two: train mm_projector against a frozen LLM, from a feature cache or on the fly.",
        epilog=EXAMPLE,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    try:
        model, data, training = parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))
    except json.JSONDecodeError as error:
        raise UserError(f"--deepspeed, or another flag that takes JSON, is no valid JSON: {error}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    problems = _refusals(model, data, training)
    if problems:
        raise combined_error(problems, "flags that stage 1 cannot honour")
    return Arguments(model, data, training)


def _refusals(model: ModelArguments, data: DataArguments, training: ProjectorTrainingArguments) -> list[str]:
    frozen = "stage 1 trains the projector alone"
    special = "LLaVA cannot train it with a tuned adapter either: its embeddings would stay random"
    checks = [
        (not model.tune_mm_mlp_adapter, f"--tune_mm_mlp_adapter must be True: {frozen}"),
        (training.freeze_mm_mlp_adapter, "--freeze_mm_mlp_adapter True would leave nothing to train; leave it out"),
        (training.lora_enable, f"--lora_enable True: {frozen}; leave it out"),
        (training.bits not in (4, 8, 16), f"--bits {training.bits}: expected 4, 8 or 16"),
        (model.mm_use_im_start_end, f"--mm_use_im_start_end True: {special}; use False"),
        (model.mm_use_im_patch_token, f"--mm_use_im_patch_token True: {special}; use False"),
        (model.mm_patch_merge_type != "flat", f"--mm_patch_merge_type {model.mm_patch_merge_type}: use flat"),
        (model.version not in TEMPLATES, f"--version {model.version}: stage 1's templates are: {', '.join(TEMPLATES)}"),
        (
            data.feature_cache is None and data.image_folder is None,
            "give --feature_cache, or --image_folder to run the tower in every step",
        ),
        (
            not 0 <= data.eval_fraction < 1,
            f"--eval_fraction {data.eval_fraction}: expected a part of the records, at least 0 and below 1",
        ),
        (
            training.do_eval and data.eval_data_path is None and not data.eval_fraction,
            "--eval_strategy needs records to evaluate on: give --eval_data_path or --eval_fraction",
        ),
        (
            bool(data.sample_captions) and not training.do_eval,
            "--sample_captions writes at each evaluation: give --eval_strategy steps or epoch too",
        ),
        *_hf_refusals(training),
        (
            model.compute_dtype not in (None, "bf16", "fp16", "fp32"),
            f"--compute_dtype {model.compute_dtype}: expected bf16, fp16 or fp32",
        ),
        (
            not _auto_or_at_least(1, training.micro_batch_size),
            f"--micro_batch_size {training.micro_batch_size}: expected auto, or a number from 1",
        ),
        (
            not _auto_or_at_least(0, training.recompute),
            f"--recompute {training.recompute}: expected auto, 0 for no layer, or k for every k-th layer",
        ),
    ]
    return [text for found, text in checks if found]


def _hf_refusals(training: ProjectorTrainingArguments) -> list[tuple[bool, str]]:
    """What HF Trainer takes, but would do nothing here, or something else than it says."""
    order = "the order of samples is LLaVA's; for batches of like length there is --group_by_modality_length True"
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    rate, warmup, epochs = training.learning_rate, training.warmup_ratio, training.num_train_epochs
    plugin, config = training.deepspeed_plugin, f"--deepspeed {training.deepspeed}"
    mismatches = [] if plugin is None else plugin.hf_ds_config.mismatches
    return [
        (training.train_sampling_strategy != "random", f"--train_sampling_strategy: {order}"),
        (training.label_smoothing_factor != 0, "--label_smoothing_factor: LLaVA's loss has none; leave it out"),
        (training.neftune_noise_alpha is not None, "--neftune_noise_alpha: the embeddings are frozen; leave it out"),
        (bool(training.fsdp), "--fsdp: to spread the LLM over devices, use --deepspeed pipelines/zero3.json"),
        (
            plugin is not None and plugin.zero_stage not in (1, 2, 3),
            f"{config}: gradients add up in float32 in ZeRO stages 1 to 3 alone; use pipelines/zero2.json, or torchrun "
            "without --deepspeed",
        ),
        (bool(mismatches), f'{config}: set to "auto" what the flags say otherwise: {" ".join(mismatches)}'),
        (
            training.save_only_model,
            "--save_only_model True: no run could go on from its checkpoints; leave it out, they are small",
        ),
        (training.push_to_hub, "--push_to_hub True: leave it out, and upload --output_dir when it is done: hf upload"),
        (batch < 1, f"--per_device_train_batch_size {batch}: expected at least 1"),
        (accumulation < 1, f"--gradient_accumulation_steps {accumulation}: expected at least 1"),
        (rate < 0, f"--learning_rate {rate}: expected at least 0"),
        (not 0 <= warmup < 1, f"--warmup_ratio {warmup}: expected a part of all steps, at least 0 and below 1"),
        (
            epochs <= 0 and training.max_steps <= 0,
            f"--num_train_epochs {epochs:g}: expected more than 0, or --max_steps; nothing would be trained",
        ),
    ]


def _auto_or_at_least(smallest: int, text: str) -> bool:
    return text == "auto" or (text.isdecimal() and int(text) >= smallest)
