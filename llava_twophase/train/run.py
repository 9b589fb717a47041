"""Phase two's run, from checked arguments to ``mm_projector.bin``; reads as the order of its steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint

from llava_twophase.cache.fingerprint import differences
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.errors import UserError, collected
from llava_twophase.records import Record, image_keys, load_records
from llava_twophase.train.arguments import Arguments
from llava_twophase.train.artefacts import llava_config, write_json
from llava_twophase.train.collator import collate
from llava_twophase.train.conversation import PlainTemplate, text_encoder
from llava_twophase.train.dataset import CaptionDataset
from llava_twophase.train.model import LlavaProjectorModel
from llava_twophase.train.projector import build_projector, load_projector, save_projector
from llava_twophase.train.trainer import ProjectorTrainer

if TYPE_CHECKING:
    from llava_twophase.train.on_the_fly import OnTheFly

logger = logging.getLogger(__name__)


def run(arguments: Arguments) -> int:
    """Train the projector and write its artefacts into ``--output_dir``.

    Args:
        arguments: The checked command line.

    Returns:
        0; whatever goes wrong is raised.

    Raises:
        UserError: Bad input, before the LLM is loaded wherever that can be known.
    """
    training = arguments.training
    # Cheap checks first: nothing below may fail after hours for a reason that was there at the start.
    _require_trackers(training.report_to)
    records = load_records(arguments.data.data_path)
    source = _feature_source(arguments, records)
    config, tokenizer = _load_text(arguments)
    set_seed(training.seed)
    tokens, width = _feature_shape(arguments, source)
    encode_text = text_encoder(arguments.model.model_name_or_path, tokenizer, training.cache_dir)
    template = PlainTemplate(tokenizer, encode_text, training.model_max_length, tokens)
    projector = _projector(arguments, width, config.get_text_config().hidden_size)
    llm = _load_llm(arguments)
    encode = None if isinstance(source, FeatureCache) else source.encode
    model = LlavaProjectorModel(llm, projector, template.image_at, encode)
    trainer = ProjectorTrainer(
        model, training, data_collator=collate, train_dataset=CaptionDataset(records, template, source)
    )
    logger.info("%d records, %d trainable weights", len(records), sum(p.numel() for p in projector.parameters()))
    folder = Path(str(training.output_dir))
    checkpoint = training.resume_from_checkpoint or (get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_json(folder / "config.json", llava_config(config, arguments, width))
        logger.info("wrote %s", save_projector(projector, folder, arguments.dtype))
    return 0


def _feature_source(arguments: Arguments, records: Sequence[Record]) -> FeatureCache | OnTheFly:
    model, data = arguments.model, arguments.data
    keys = image_keys(records)
    if data.feature_cache is None:
        from llava_twophase.train.on_the_fly import OnTheFly

        source = OnTheFly(str(data.image_folder), model.vision_tower, data.image_aspect_ratio)
        source.require(keys)
        return source
    cache = FeatureCache(data.feature_cache)
    _require_same(cache, arguments)
    missing = [key for key in keys if key not in cache]
    if missing:
        raise collected(
            missing, f"{len(missing)} of {len(keys)} images have no features in {cache.path}; extract them first"
        )
    return cache


def _require_same(cache: FeatureCache, arguments: Arguments) -> None:
    model, fingerprint = arguments.model, cache.fingerprint
    layer = model.mm_vision_select_layer
    wanted = {
        # One spelling for one layer: 23 of 24 is -2.
        "select_layer": layer if layer < 0 else layer - fingerprint["tower"]["num_hidden_layers"] - 1,
        "select_feature": model.mm_vision_select_feature,
        "image_aspect_ratio": arguments.data.image_aspect_ratio,
    }
    found = differences(fingerprint, wanted)
    made_by = cache.manifest.provenance.get("vision_tower")
    if made_by != model.vision_tower:
        found.append(f"vision_tower: the cache has {made_by!r}, this run {model.vision_tower!r}")
    if found:
        raise collected(found, f"{cache.path} was made otherwise; use its settings, or extract another cache")


def _load_text(arguments: Arguments) -> tuple[Any, Any]:
    name, cache_dir = arguments.model.model_name_or_path, arguments.training.cache_dir
    try:
        config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
        tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {name}: its config or tokenizer cannot be loaded: {error}") from None
    return config, tokenizer


def _feature_shape(arguments: Arguments, source: FeatureCache | OnTheFly) -> tuple[int, int]:
    if isinstance(source, FeatureCache):
        return source.feature_shape
    model = arguments.model
    return source.load_tower(
        model.mm_vision_select_layer, model.mm_vision_select_feature, arguments.tower_dtype, arguments.training.device
    )


def _projector(arguments: Arguments, width: int, hidden_size: int) -> torch.nn.Module:
    projector = build_projector(arguments.model.mm_projector_type, width, hidden_size)
    if arguments.model.pretrain_mm_mlp_adapter is not None:
        load_projector(arguments.model.pretrain_mm_mlp_adapter, projector)
    return projector


def _load_llm(arguments: Arguments) -> Any:
    if is_deepspeed_zero3_enabled():
        raise UserError("--deepspeed asks for ZeRO-3, which is not supported yet; use pipelines/zero2.json")
    model, training = arguments.model, arguments.training
    try:
        return AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path,
            cache_dir=training.cache_dir,
            dtype=arguments.dtype,
            # Straight to this rank's device: the host never holds one copy for each rank.
            device_map={"": training.device},
            attn_implementation=model.attn_implementation,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {model.model_name_or_path} cannot be loaded: {error}") from None


def _require_trackers(report_to: str | list[str] | None) -> None:
    names = [report_to] if isinstance(report_to, str) else report_to or []
    missing = [name for name in names if name in ("wandb", "tensorboard", "trackio") and find_spec(name) is None]
    if missing:
        extra = ",".join(missing)
        raise UserError(f"--report_to {extra}: pip install 'llava-twophase[{extra}]' first, or use --report_to none")
