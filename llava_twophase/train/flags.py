"""The flags of phase two as dataclasses, without HF Trainer's: importing this module loads no torch.

``arguments.py`` adds HF Trainer's flags, and ``help.py`` shows the flags by subject.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llava_twophase.layers import Layers, as_layers
from llava_twophase.multi_scale import DEFAULT_SCALES
from llava_twophase.projectors.names import SHIPPED, parse_kwargs


def _flag(default: Any, text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": text, **extra})


def plain(value: Any) -> Any:
    """Return the only element of a list of one, and any other value as it is: the form of a flag's value in JSON."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


@dataclass
class ModelArguments:
    """The LLM, the tower and the projector between them."""

    model_name_or_path: str = field(metadata={"help": "base LLM: hub id or local folder; required", "metavar": "LLM"})
    vision_tower: list[str] = field(
        metadata={
            "help": "vision tower: hub id or local folder; required, but not loaded with a cache. Several are joined "
            "on channels, and the other flags of the tower apply to each",
            "metavar": "TOWER",
        }
    )
    version: str = _flag("plain", "conversation template; stage 1 has one: plain")
    mm_projector_type: str = _flag(
        "linear",
        f"linear, or mlp2x_gelu for LLaVA-1.5; also {', '.join(SHIPPED)}, and package.module:ClassName for an "
        "nn.Module of your own",
    )
    mm_projector_kwargs: str | None = _flag(
        None, "arguments of a projector that is not LLaVA's, as a JSON object", metavar="JSON"
    )
    tune_mm_mlp_adapter: bool = _flag(False, "must be True: stage 1 trains the projector alone")
    mm_tunable_parts: str | None = _flag(None, "LLaVA-NeXT's name for --tune_mm_mlp_adapter True: mm_mlp_adapter")
    pretrain_mm_mlp_adapter: str | None = _flag(None, "projector file to start from", metavar="FILE")
    mm_vision_select_layer: list[int] = field(
        default_factory=lambda: [-2],
        metadata={"help": "hidden state of the tower; several are concatenated on channels", "metavar": "LAYER"},
    )
    mm_vision_select_feature: str = _flag("patch", "patch, or cls_patch to keep the CLS token")
    interpolate_patch_grid: bool = _flag(
        False, "several towers: resample patch grids of other sizes to the first one's, bilinearly; otherwise an error"
    )
    s2: bool = _flag(False, "True: multi-scale features, as in LLaVA's S2 mode")
    s2_scales: str = _flag(DEFAULT_SCALES, "with --s2 True: sides in pixels")
    mm_patch_merge_type: str = _flag("flat", "stage 1 has one: flat")
    mm_use_im_start_end: bool = _flag(False, "must be False: it needs trained embeddings")
    mm_use_im_patch_token: bool = _flag(False, "must be False: it needs trained embeddings")
    compute_dtype: list[str] | None = _flag(
        None,
        "on-the-fly tower: bf16, fp16 or fp32 (default: bf16 with --bf16, else fp16, as LLaVA); several towers: one, "
        "or one each",
        metavar="DTYPE",
    )
    attn_implementation: str | None = _flag(None, "the LLM's attention: sdpa, flash_attention_2, eager")
    freeze_backbone: bool = _flag(False, "accepted: the LLM is always frozen here")
    mpt_attn_impl: str | None = _flag(None, "accepted and ignored: for MPT models only")

    @property
    def select_layer(self) -> Layers:
        """``--mm_vision_select_layer``: a number for one layer."""
        return as_layers(self.mm_vision_select_layer)

    @property
    def projector_kwargs(self) -> dict[str, Any]:
        """``--mm_projector_kwargs`` as a dictionary, empty without the flag.

        Raises:
            UserError: It is not a JSON object.
        """
        return parse_kwargs(self.mm_projector_kwargs)


@dataclass
class DataArguments:
    """Records, and where their features come from."""

    data_path: str = field(
        metadata={"help": "records: LLaVA's JSON list, JSON Lines or Parquet; required", "metavar": "RECORDS"}
    )
    image_folder: str | None = _flag(
        None, "folder, .zip or .tar of the images; needed without --feature_cache", metavar="FOLDER"
    )
    feature_cache: list[str] | None = _flag(
        None,
        "cache that phase one wrote, a folder or a URL (https://, s3://, hf://, ...); without it the tower runs in "
        "every step. For several --vision_tower, their caches in the same order",
        metavar="CACHE",
    )
    stage_dir: str | None = _flag(
        None,
        "folder for copies of the shards of a cache at a URL, made ahead of their use and shared by the ranks of a "
        "machine; needs --stage_gb",
        metavar="FOLDER",
    )
    stage_gb: float = _flag(0.0, "most disk space of --stage_dir, in GB")
    image_aspect_ratio: str = _flag("square", "square or pad")
    eval_data_path: str | None = _flag(None, "records to evaluate on; needs --eval_strategy", metavar="RECORDS")
    eval_fraction: float = _flag(
        0.0,
        "fraction of --data_path to hold out; held_out.json in --output_dir lists its records, and --eval_strategy "
        "evaluates them during training",
    )
    sample_captions: int = _flag(0, "captions to write at each evaluation, with thumbnails, as HTML and to the tracker")
    drop_quarantined: bool = _flag(
        False, "drop records whose image is in the cache's quarantine.jsonl; otherwise they are an error"
    )
    drop_unk_tokens: bool = _flag(
        False, "drop <unk> from captions, as LLaVA's padding mask does by accident; for exact comparisons with it"
    )
    lazy_preprocess: bool = _flag(True, "accepted: captions are always tokenised when needed")
    is_multimodal: bool = _flag(True, "accepted: every record has an image here")

    @property
    def holds_out(self) -> bool:
        """Whether the run holds records of ``--data_path`` out; ``--eval_data_path`` takes precedence."""
        return self.eval_fraction > 0 and self.eval_data_path is None


@dataclass
class TrainingFlags:
    """Flags of the training loop: those that HF Trainer does not have, and those with another default or help text."""

    output_dir: str | None = _flag(
        None, "folder of the run: checkpoints, mm_projector.bin, config.json; required", metavar="FOLDER"
    )
    resume_from_checkpoint: str | None = _flag(
        None,
        "a checkpoint's folder; True: the newest one, which must exist; False: there must be none (default: the newest "
        "one, if there is one)",
    )
    enable_jit_checkpoint: bool = _flag(
        False, "has no effect: SIGTERM and SIGUSR1 always write a checkpoint and end the run"
    )
    ddp_find_unused_parameters: bool | None = _flag(False, "has no effect: every step uses the complete projector")
    eval_strategy: str = _flag("no", "no, steps or epoch", aliases=["--evaluation_strategy"])
    warmup_ratio: float = _flag(0.0, "fraction of all steps for warm-up; the same as a fraction in --warmup_steps")
    optim: str = _flag("adamw_torch", "optimizer, as in HF Trainer")
    average_tokens_across_devices: bool = _flag(
        False, "False: LLaVA's loss, the mean of each device's batch; True: the mean over the tokens of the whole batch"
    )
    logging_nan_inf_filter: bool = _flag(False, "True would hide a loss that is not finite; here it ends the run")
    remove_unused_columns: bool = _flag(False, "has no effect: samples hold only the model's inputs")
    plan: str | None = _flag(
        None,
        "report sequence lengths, steps, memory, checkpoints and time of this command, write nothing, and stop; 24 or "
        "8x80: for one GPU of 24 GB, or eight of 80 GB, that are not at hand",
        nargs="?",
        const="here",
        metavar="GPUS",
    )
    model_max_length: int = _flag(2048, "longest sequence, the image's positions included")
    group_by_modality_length: bool = _flag(False, "batches of similar text length, as LLaVA groups them")
    micro_batch_size: str = _flag(
        "auto", "samples of one pass through the LLM; auto: by free memory. Neither this nor --recompute changes a loss"
    )
    recompute: str = _flag(
        "auto",
        "activation checkpointing: 0 for no layer, k for every k-th layer; auto: by free memory, also with "
        "--gradient_checkpointing True",
    )
    mm_projector_lr: float | None = _flag(None, "learning rate of the projector; overrides --learning_rate")
    freeze_mm_mlp_adapter: bool = _flag(False, "must be False: nothing would be trained")
    cache_dir: str | None = _flag(None, "where hub downloads are kept", metavar="FOLDER")
    bits: int = _flag(16, "bits of the frozen LLM's weights: 16, or 8 or 4 with bitsandbytes on a GPU")
    double_quant: bool = _flag(True, "only with --bits 4")
    quant_type: str = _flag("nf4", "only with --bits 4")
    lora_enable: bool = _flag(False, "must be False: stage 1 trains the projector alone")
    lora_r: int = _flag(64, "accepted: has no effect without LoRA")
    lora_alpha: int = _flag(16, "accepted: has no effect without LoRA")
    lora_dropout: float = _flag(0.05, "accepted: has no effect without LoRA")
    lora_weight_path: str = _flag("", "accepted: has no effect without LoRA")
    lora_bias: str = _flag("none", "accepted: has no effect without LoRA")
