"""Flags that stage 1 cannot honour, each with the reason and the replacement."""

from __future__ import annotations

import re
from collections.abc import Collection

from llava_twophase.cache.storage import is_url
from llava_twophase.compat import deepspeed_mismatches, zero_stage
from llava_twophase.text import counted
from llava_twophase.train.arguments import Arguments, ProjectorTrainingArguments
from llava_twophase.train.data.conversation import TEMPLATES
from llava_twophase.train.flags import DataArguments, ModelArguments

# A flag that the check concerns, whether its value is refused, and the message.
Check = tuple[str, bool, str]


def flag_problems(arguments: Arguments, skip: Collection[str] = ()) -> list[tuple[str, str]]:
    """Return the name and a message for each flag that cannot be honoured.

    Args:
        arguments: The parsed command line.
        skip: Names of flags that are not checked.
    """
    model, data, training = arguments.model, arguments.data, arguments.training
    checks = [
        *_stage_one(model, training),
        *_data(data, training),
        *_joined(model, data),
        *_without_effect(training),
        *_numbers(training),
        *_deepspeed(training),
        *_micro_batches(training),
    ]
    return [(flag, message) for flag, refused, message in checks if refused and flag not in skip]


def flag_hints(arguments: Arguments) -> list[str]:
    """Return what a user of LLaVA's recipe may not expect, one line each: it is logged, and the run starts."""
    data, training, given = arguments.data, arguments.training, arguments.given
    held_out = (
        "--eval_data_path" if data.eval_data_path is not None else "--eval_fraction" if data.eval_fraction else ""
    )
    hints = [
        (
            not {"learning_rate", "mm_projector_lr"} & given.keys(),
            f"--learning_rate was not given: the default of HF Trainer, {training.learning_rate:g}, is used; LLaVA's "
            "recipe has --learning_rate 1e-3",
        ),
        (
            bool(held_out) and not training.do_eval,
            f"{held_out} without --eval_strategy: its records are not evaluated during training; for that, give "
            "--eval_strategy steps or epoch",
        ),
    ]
    return [hint for applies, hint in hints if applies]


def _stage_one(model: ModelArguments, training: ProjectorTrainingArguments) -> list[Check]:
    alone = "stage 1 trains the projector alone"
    special = "LLaVA cannot train it with a tuned adapter either: its embeddings would stay random"
    parts = model.mm_tunable_parts
    dtypes, towers = model.compute_dtype or [], len(model.vision_tower)
    return [
        (
            "tune_mm_mlp_adapter",
            not model.tune_mm_mlp_adapter and parts is None,
            f"--tune_mm_mlp_adapter must be True: {alone}",
        ),
        (
            "mm_tunable_parts",
            parts not in (None, "mm_mlp_adapter"),
            f"--mm_tunable_parts {parts}: {alone}; use --mm_tunable_parts mm_mlp_adapter",
        ),
        (
            "freeze_mm_mlp_adapter",
            training.freeze_mm_mlp_adapter,
            "--freeze_mm_mlp_adapter True would leave nothing to train; remove it",
        ),
        ("lora_enable", training.lora_enable, f"--lora_enable True: {alone}; remove it"),
        ("bits", training.bits not in (4, 8, 16), f"--bits {training.bits}: expected 4, 8 or 16"),
        ("mm_use_im_start_end", model.mm_use_im_start_end, f"--mm_use_im_start_end True: {special}; use False"),
        ("mm_use_im_patch_token", model.mm_use_im_patch_token, f"--mm_use_im_patch_token True: {special}; use False"),
        (
            "mm_patch_merge_type",
            model.mm_patch_merge_type != "flat",
            f"--mm_patch_merge_type {model.mm_patch_merge_type}: use flat",
        ),
        (
            "version",
            model.version not in TEMPLATES,
            f"--version {model.version}: the templates of stage 1 are: {', '.join(TEMPLATES)}",
        ),
        (
            "compute_dtype",
            not {"bf16", "fp16", "fp32"}.issuperset(dtypes) or len(dtypes) not in (0, 1, towers),
            f"--compute_dtype {' '.join(dtypes)}: expected bf16, fp16 or fp32, one for all towers or one for each",
        ),
    ]


def _data(data: DataArguments, training: ProjectorTrainingArguments) -> list[Check]:
    return [
        (
            "feature_cache",
            data.feature_cache is None and data.image_folder is None,
            "give --feature_cache, or --image_folder to run the tower in every step",
        ),
        (
            "stage_dir",
            data.stage_dir is not None and not any(map(is_url, data.feature_cache or [])),
            "--stage_dir copies shards of a cache at a URL, and --feature_cache is not one: remove it",
        ),
        (
            "stage_gb",
            (data.stage_dir is None) != (data.stage_gb == 0) or not 0 <= data.stage_gb < 1e9,
            f"--stage_gb {data.stage_gb:g}: give --stage_dir and --stage_gb together, with a positive number of GB",
        ),
        (
            "eval_fraction",
            not 0 <= data.eval_fraction < 1,
            f"--eval_fraction {data.eval_fraction}: expected a fraction of the records, at least 0 and below 1",
        ),
        (
            "eval_strategy",
            training.do_eval and data.eval_data_path is None and not data.eval_fraction,
            "--eval_strategy needs records to evaluate on: give --eval_data_path or --eval_fraction",
        ),
        (
            "sample_captions",
            bool(data.sample_captions) and not training.do_eval,
            "--sample_captions writes captions at each evaluation: give --eval_strategy steps or epoch too",
        ),
    ]


def _joined(model: ModelArguments, data: DataArguments) -> list[Check]:
    """Check the flags of joined towers and caches."""
    towers, caches = len(model.vision_tower), len(data.feature_cache or [])
    return [
        (
            "feature_cache" if towers > caches else "vision_tower",
            bool(caches) and towers != caches,
            f"{counted(caches, 'feature cache')} and {counted(towers, 'vision tower')} were given: joined caches need "
            "the tower of each, as --vision_tower TOWER ... --feature_cache CACHE ... in the same order",
        ),
        (
            "interpolate_patch_grid",
            model.interpolate_patch_grid and towers == 1,
            "--interpolate_patch_grid True: there is one vision tower and nothing to join; remove it",
        ),
        (
            "interpolate_patch_grid",
            model.interpolate_patch_grid and model.mm_vision_select_feature == "cls_patch",
            "--interpolate_patch_grid True: a CLS token has no place in a patch grid; use --mm_vision_select_feature "
            "patch",
        ),
    ]


def _without_effect(training: ProjectorTrainingArguments) -> list[Check]:
    """Check HF Trainer flags that have no effect here, or a different one."""
    order = "the sample order is LLaVA's; for batches of similar length use --group_by_modality_length True"
    return [
        (
            "train_sampling_strategy",
            training.train_sampling_strategy != "random",
            f"--train_sampling_strategy: {order}",
        ),
        (
            "label_smoothing_factor",
            training.label_smoothing_factor != 0,
            "--label_smoothing_factor: LLaVA's loss has none; remove it",
        ),
        (
            "neftune_noise_alpha",
            training.neftune_noise_alpha is not None,
            "--neftune_noise_alpha: the embeddings are frozen; remove it",
        ),
        (
            "fsdp",
            bool(training.fsdp),
            "--fsdp: to spread the LLM over devices, use --deepspeed pipelines/zero3.json",
        ),
        (
            "save_only_model",
            training.save_only_model,
            "--save_only_model True: runs cannot resume from such checkpoints; remove it, complete ones are small",
        ),
        (
            "push_to_hub",
            training.push_to_hub,
            "--push_to_hub True: remove it, and upload --output_dir after the run: hf upload",
        ),
        (
            "output_dir",
            training.n_gpu > 1 and training.plan is None,
            f"{training.n_gpu} GPUs are visible, but one process was started: use torchrun --nproc_per_node "
            f"{training.n_gpu} pipelines/train_projector.py ..., or CUDA_VISIBLE_DEVICES=0 for one GPU",
        ),
    ]


def _numbers(training: ProjectorTrainingArguments) -> list[Check]:
    batch = training.per_device_train_batch_size
    accumulation = training.gradient_accumulation_steps
    epochs = training.num_train_epochs
    return [
        ("per_device_train_batch_size", batch < 1, f"--per_device_train_batch_size {batch}: expected at least 1"),
        (
            "gradient_accumulation_steps",
            accumulation < 1,
            f"--gradient_accumulation_steps {accumulation}: expected at least 1",
        ),
        (
            "learning_rate",
            training.learning_rate < 0,
            f"--learning_rate {training.learning_rate}: expected at least 0",
        ),
        (
            "warmup_ratio",
            not 0 <= training.warmup_ratio < 1,
            f"--warmup_ratio {training.warmup_ratio}: expected a fraction of all steps, at least 0 and below 1",
        ),
        (
            "num_train_epochs",
            epochs <= 0 and training.max_steps <= 0,
            f"--num_train_epochs {epochs:g}: expected more than 0, or --max_steps; nothing would be trained",
        ),
    ]


def _deepspeed(training: ProjectorTrainingArguments) -> list[Check]:
    stage = zero_stage(training)
    if stage is None:
        return []
    config, mismatches = f"--deepspeed {training.deepspeed}", deepspeed_mismatches(training)
    return [
        (
            "deepspeed",
            stage not in (1, 2, 3),
            f"{config}: only ZeRO stages 1 to 3 accumulate gradients in float32; use pipelines/zero2.json, or "
            "torchrun without --deepspeed",
        ),
        (
            "deepspeed",
            bool(mismatches),
            f'{config}: it differs from the flags; set these to "auto": {" ".join(mismatches)}',
        ),
    ]


def _micro_batches(training: ProjectorTrainingArguments) -> list[Check]:
    return [
        (
            "plan",
            training.plan is not None and re.fullmatch(r"here|True|([1-9]\d*x)?\d+(\.\d+)?", training.plan) is None,
            f"--plan {training.plan}: expected no value, or GPUs that are not at hand, such as 24 (GB) or 8x80",
        ),
        (
            "micro_batch_size",
            not _auto_or_at_least(1, training.micro_batch_size),
            f"--micro_batch_size {training.micro_batch_size}: expected auto, or a number from 1",
        ),
        (
            "recompute",
            not _auto_or_at_least(0, training.recompute),
            f"--recompute {training.recompute}: expected auto, 0 for no layer, or k for every k-th layer",
        ),
    ]


def _auto_or_at_least(smallest: int, text: str) -> bool:
    return text == "auto" or (text.isdecimal() and int(text) >= smallest)
