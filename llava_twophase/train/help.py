"""``--help`` of the training command: its flags by subject, from dataclasses and a short list; loads no torch.

A test compares names and defaults with those of the parser that ``command_line.py`` builds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from llava_twophase.train.flags import DataArguments, ModelArguments, TrainingFlags

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
_DESCRIPTION = "Phase two: train mm_projector against a frozen LLM, from a feature cache or on the fly."
_ACCEPTED = "accepted from other commands: no effect, or one value"
_OTHERS = "Hugging Face Trainer's other flags"
_SUBJECTS: Mapping[str, Sequence[str]] = {
    "before a run": ("plan",),
    "models": (
        *("model_name_or_path", "vision_tower", "mm_projector_type", "mm_projector_kwargs", "pretrain_mm_mlp_adapter"),
        *("tune_mm_mlp_adapter", "mm_tunable_parts", "version", "mm_vision_select_layer", "mm_vision_select_feature"),
        *("s2", "s2_scales", "interpolate_patch_grid", "cache_dir"),
    ),
    "data": (
        *("data_path", "feature_cache", "stage_dir", "stage_gb", "image_folder", "image_aspect_ratio"),
        *("model_max_length", "drop_quarantined"),
        *("drop_unk_tokens", "group_by_modality_length", "dataloader_num_workers", "dataloader_drop_last"),
    ),
    "training": (
        *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "mm_projector_lr", "weight_decay", "warmup_ratio", "lr_scheduler_type", "optim"),
        *("max_grad_norm", "average_tokens_across_devices", "seed", "data_seed"),
    ),
    "precision, memory and speed": (
        *("bf16", "fp16", "tf32", "compute_dtype", "bits", "double_quant", "quant_type", "deepspeed"),
        *("micro_batch_size", "recompute", "gradient_checkpointing", "attn_implementation", "torch_compile"),
        *("use_liger_kernel", "use_cpu"),
    ),
    "evaluation": (
        *("eval_data_path", "eval_fraction", "eval_strategy", "eval_steps", "per_device_eval_batch_size"),
        "sample_captions",
    ),
    "output, checkpoints and logs": (
        *("output_dir", "resume_from_checkpoint", "save_strategy", "save_steps", "save_total_limit"),
        *("load_best_model_at_end", "logging_steps", "report_to", "run_name"),
    ),
}


@dataclass(frozen=True)
class Flag:
    """A flag as ``--help`` shows it.

    Attributes:
        name: Without dashes.
        kind: What its values are, in capital letters.
        default: Shown unless it is None or empty.
        text: What it does.
        aliases: Other spellings, with dashes.
    """

    name: str
    kind: str
    default: Any
    text: str
    aliases: Sequence[str] = ()


# HF Trainer's flags that LLaVA's recipe or this project's documentation uses.
_TRAINER = (
    Flag("dataloader_num_workers", "N", 0, "processes that decode images; a feature cache needs none"),
    Flag("dataloader_drop_last", "BOOL", False, "drop the last batch of an epoch if it is incomplete"),
    Flag("num_train_epochs", "X", 3.0, "passes over the records"),
    Flag("max_steps", "N", -1, "optimizer steps; above 0 it overrides --num_train_epochs"),
    Flag("per_device_train_batch_size", "N", 8, "samples of one batch on one device"),
    Flag("gradient_accumulation_steps", "N", 1, "batches of one optimizer step"),
    Flag("learning_rate", "X", 5e-5, "LLaVA's recipe has 1e-3"),
    Flag("weight_decay", "X", 0.0, "weight decay of the projector"),
    Flag("lr_scheduler_type", "NAME", "linear", "schedule of the learning rate; LLaVA's recipe has cosine"),
    Flag("max_grad_norm", "X", 1.0, "largest norm of the projector's gradient"),
    Flag("seed", "N", 42, "seed of the initial projector, the held-out records and the sample order"),
    Flag("data_seed", "N", None, "seed of the sample order (default: --seed)"),
    Flag("bf16", "BOOL", False, "the LLM in bfloat16"),
    Flag("fp16", "BOOL", False, "the LLM in float16"),
    Flag("tf32", "BOOL", None, "TF32 for float32 matrices, on an Ampere or newer GPU"),
    Flag("deepspeed", "FILE", None, "DeepSpeed configuration: pipelines/zero2.json, zero3.json, zero3_offload.json"),
    Flag("gradient_checkpointing", "BOOL", None, "accepted: free memory decides; --recompute overrides it"),
    Flag("torch_compile", "BOOL", False, "compile the decoder layers"),
    Flag("use_liger_kernel", "BOOL", False, "Liger's kernels for the LLM, on a GPU"),
    Flag("use_cpu", "BOOL", False, "train on the CPU even if there is an accelerator"),
    Flag("eval_steps", "X", None, "steps between evaluations; below 1 a fraction of all steps"),
    Flag("per_device_eval_batch_size", "N", 8, "samples of one evaluation batch on one device"),
    Flag("save_strategy", "NAME", "steps", "no, steps or epoch"),
    Flag("save_steps", "X", 500, "steps between checkpoints; below 1 a fraction of all steps"),
    Flag("save_total_limit", "N", None, "checkpoints to keep"),
    Flag("load_best_model_at_end", "BOOL", False, "write the projector of the best evaluation"),
    Flag("logging_steps", "X", 500, "steps between log lines; below 1 a fraction of all steps"),
    Flag("report_to", "NAME [NAME ...]", "none", "experiment tracker: wandb, tensorboard, ..., all or none"),
    Flag("run_name", "NAME", None, "name of the run in the tracker"),
)
_KINDS = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}


def shown_flags() -> dict[str, list[Flag]]:
    """Return the flags that ``--help`` shows, by subject."""
    known = {flag.name: flag for flag in (*_TRAINER, *_flags_of(ModelArguments, DataArguments, TrainingFlags))}
    groups = {subject: [known.pop(name) for name in names] for subject, names in _SUBJECTS.items()}
    return {**groups, _ACCEPTED: list(known.values())}


def help_text(others: Iterable[argparse.Action] = ()) -> str:
    """Return the text of ``--help``.

    Args:
        others: Flags of the parser; those that ``--help`` does not show are added, for ``--help-all``.
    """
    parser = argparse.ArgumentParser(
        prog="llava-train-projector",
        usage="%(prog)s --model_name_or_path LLM --vision_tower TOWER --data_path RECORDS --output_dir FOLDER ...",
        description=_DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    shown = shown_flags()
    for subject, flags in shown.items():
        group = parser.add_argument_group(subject)
        for flag in flags:
            shown_default = " ".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
            default = "" if shown_default in (None, "") else f" (default: {shown_default})"
            group.add_argument(f"--{flag.name}", *flag.aliases, metavar=flag.kind, help=flag.text + default)
    names = {f"--{flag.name}" for flags in shown.values() for flag in flags}
    rest = [action for action in others if action.option_strings[0] not in names]
    if rest:
        group = parser.add_argument_group(_OTHERS)
        for action in rest:
            default = "" if action.default in (None, "") else " (default: %(default)s)"
            group.add_argument(
                *action.option_strings, default=action.default, metavar="VALUE", help=f"{action.help or ''}{default}"
            )
    group = parser.add_argument_group("help")
    group.add_argument("-h", "--help", action="store_true", help="show the flags of this project and of LLaVA's recipe")
    group.add_argument("--help-all", action="store_true", help=f"also show {_OTHERS}")
    return parser.format_help()


def _flags_of(*groups: type[Any]) -> Iterable[Flag]:
    for group in groups:
        hints = get_type_hints(group)
        for item in fields(group):
            types = get_args(hints[item.name]) or (hints[item.name],)  # of `int | None`: int first
            kind = item.metadata.get("metavar") or _KINDS[types[0]]
            if list in (get_origin(hints[item.name]), *map(get_origin, types)):
                kind = f"{kind} [{kind} ...]"
            elif item.metadata.get("nargs") == "?":
                kind = f"[{kind}]"
            default = None if item.default is MISSING else item.default
            if item.default_factory is not MISSING:
                default = item.default_factory()
            yield Flag(item.name, kind, default, item.metadata["help"], item.metadata.get("aliases", ()))
