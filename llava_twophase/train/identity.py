"""What two runs must have in common for one to resume from the checkpoints of the other."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformers.training_args import OptimizerNames

from llava_twophase.cache.fingerprint import differences
from llava_twophase.compat import gradient_clipping
from llava_twophase.train.arguments import Arguments
from llava_twophase.train.layout import Layout, flags_for_global_batch
from llava_twophase.train.llm_files import llm_identity
from llava_twophase.train.preflight import TrainingInputs

# What to change where two values of a field differ; other fields have the name of their flag.
_FLAGS = {
    "global_batch_size": "--gradient_accumulation_steps",
    "records_sha256": "--data_path, --eval_fraction or --drop_quarantined",
    "tokenizer": "tokenizer of --model_name_or_path",
    "features": "--feature_cache, or --vision_tower and its flags",
    "llm": "--model_name_or_path",
    "mm_projector_source": "the source file of --mm_projector_type; restore it to resume",
    "dtype": "--bf16 or --fp16",
    "learning_rate": "--learning_rate or --mm_projector_lr",
    "max_grad_norm": "--max_grad_norm, or gradient_clipping of --deepspeed",
    "adam": "--adam_beta1, --adam_beta2 or --adam_epsilon",
    "warmup_steps": "--warmup_steps or --warmup_ratio",
}


def run_identity(arguments: Arguments, inputs: TrainingInputs) -> dict[str, Any]:
    """Return the settings and the digests of the inputs that decide the outcome of a run.

    The length of the run is not part of it: a run may be continued for longer.
    """
    return {**_data(arguments, inputs), **_model(arguments), **_projector(inputs), **_optimization(arguments)}


def identity_differences(
    found: dict[str, Any], expected: dict[str, Any], name: str, layout: Layout | None = None
) -> list[str]:
    """Compare the identities of two runs; return one line for each field that differs, with its flag.

    Args:
        found: The identity of the earlier run.
        expected: The identity of this run.
        name: What to call the earlier run in the result.
        layout: This run's layout, to say how it gets another global batch.
    """
    lines = differences(found, expected, names=(name, "this run"))
    fields = [line.partition(":")[0].partition(".")[0] for line in lines]
    flags = dict(_FLAGS)
    if layout is not None and "global_batch_size" in found:
        flags["global_batch_size"] = flags_for_global_batch(found["global_batch_size"], layout)
    return [f"{line} ({flags.get(field, f'--{field}')})" for line, field in zip(lines, fields, strict=True)]


def _data(arguments: Arguments, inputs: TrainingInputs) -> dict[str, Any]:
    training = arguments.training
    return {
        "global_batch_size": Layout.of(training).global_batch,
        "seed": training.seed,
        "data_seed": training.seed if training.data_seed is None else training.data_seed,
        "dataloader_drop_last": training.dataloader_drop_last,
        "group_by_modality_length": training.group_by_modality_length,
        "drop_unk_tokens": arguments.data.drop_unk_tokens,
        "model_max_length": training.model_max_length,
        "tokenizer": inputs.template.tokenizer.identity,
        "records_sha256": inputs.records.digest(),
        "features": inputs.source.identity,
    }


def _model(arguments: Arguments) -> dict[str, Any]:
    model, training = arguments.model, arguments.training
    return {
        "llm": llm_identity(model.model_name_or_path),
        "dtype": str(arguments.dtype).removeprefix("torch."),
        "bits": training.bits,
        "mm_projector_type": model.mm_projector_type,
        "pretrain_mm_mlp_adapter": _file_digest(model.pretrain_mm_mlp_adapter),
    }


def _projector(inputs: TrainingInputs) -> dict[str, Any]:
    # LLaVA's own types have neither, as in checkpoints of earlier versions.
    names = ("mm_projector_kwargs", "mm_projector_source")
    return {name: inputs.projector_record[name] for name in names if name in inputs.projector_record}


def _optimization(arguments: Arguments) -> dict[str, Any]:
    # A checkpoint's optimizer and scheduler would silently override other values of these.
    training = arguments.training
    return {
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "optim": OptimizerNames(training.optim).value,
        "optim_args": training.optim_args,
        "adam": [training.adam_beta1, training.adam_beta2, training.adam_epsilon],
        "max_grad_norm": gradient_clipping(training),
        "lr_scheduler_type": str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)),
        "lr_scheduler_kwargs": training.lr_scheduler_kwargs,
        "warmup_steps": training.warmup_steps,
        "average_tokens_across_devices": training.average_tokens_across_devices,
    }


def _file_digest(path: str | None) -> str | None:
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
