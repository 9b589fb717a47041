"""Load and check the inputs of a run before the LLM is loaded, and report all problems together."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from llava_twophase.errors import UserError, combined_error, short_repr
from llava_twophase.hub import use_cache_if_unreachable
from llava_twophase.projectors.build import (
    ProjectorSpec,
    build_projector,
    check_projector,
    projector_record,
    require_projector,
)
from llava_twophase.records import Records, load_records
from llava_twophase.text import counted
from llava_twophase.train.arguments import Arguments
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.feature_source import FeatureSource
from llava_twophase.train.data.row_limits import RowLengths, find_id_out_of_range, measure_rows, record_at
from llava_twophase.train.data.source import open_source
from llava_twophase.train.data.tokenizer import load_caption_tokenizer
from llava_twophase.train.environment import (
    require_compiler,
    require_launcher,
    require_optimizer,
    require_output,
    require_space,
    require_trackers,
)
from llava_twophase.train.llm_files import load_config_and_tokenizer
from llava_twophase.train.model.llm_config import check_data_fits
from llava_twophase.train.model.load_llm import require_bits, require_generation_config, require_liger
from llava_twophase.train.model.projector import load_weights

logger = logging.getLogger(__name__)

_SOURCE_FLAGS = (
    *("feature_cache", "image_folder", "vision_tower", "mm_vision_select_layer", "interpolate_patch_grid"),
    "compute_dtype",
)


@dataclass
class TrainingInputs:
    """The checked inputs of a run, except the LLM's weights.

    Attributes:
        records: To train on.
        eval_records: To evaluate on, may be empty.
        source: Where features come from.
        config: The LLM's configuration.
        tokenizer: The LLM's tokenizer.
        template: Tokenizes captions.
        rows: Lengths of the rows that it makes, held-out ones included.
        projector: Freshly initialised, or from ``--pretrain_mm_mlp_adapter``.
        spec: What it was built from.
        projector_record: Its fields of ``config.json``, as ``projector_record`` returns them.
    """

    records: Records
    eval_records: Records
    source: FeatureSource
    config: Any
    tokenizer: Any
    template: PlainTemplate
    rows: RowLengths
    projector: torch.nn.Module
    spec: ProjectorSpec
    projector_record: dict[str, Any]


def prepare_inputs(arguments: Arguments, skip: Collection[str] = ()) -> TrainingInputs:
    """Load and check everything except the LLM's weights.

    Args:
        arguments: The checked command line.
        skip: Names of flags whose checks are skipped, those of devices that are not at hand.

    Raises:
        UserError: All problems that were found, in one error.
    """
    checked, problems = _check(arguments, skip)
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise combined_error(problems, f"{len(problems)} problems were found; nothing was started")
    records, eval_records = checked["records"]
    source = checked["source"]
    config, tokenizer = checked["text"]
    # The tower of an on-the-fly run is loaded last: it may be downloaded.
    spec = _projector_spec(arguments, source.load(), config)
    projector, image_tokens = _build(spec, arguments)
    template = _template(arguments, tokenizer, image_tokens)
    parts = records, eval_records
    rows = measure_rows(parts, template)
    _require_fitting_rows(config, parts, template, rows)
    require_space(arguments, sum(parameter.numel() for parameter in projector.parameters()))
    return TrainingInputs(
        records=records,
        eval_records=eval_records,
        source=source,
        config=config,
        tokenizer=tokenizer,
        template=template,
        rows=rows,
        projector=projector,
        spec=spec,
        projector_record=projector_record(projector, spec, image_tokens),
    )


def find_input_problems(arguments: Arguments, skip: Collection[str] = ()) -> list[str]:
    """Return what is wrong with the inputs of a command line that has other problems too.

    Args:
        arguments: The parsed command line.
        skip: Names of flags whose value is not known; checks that need one of them are skipped.
    """
    return _check(arguments, skip)[1]


def _load_text(arguments: Arguments) -> tuple[Any, Any]:
    return load_config_and_tokenizer(arguments.model.model_name_or_path, arguments.training.cache_dir)


def _check(arguments: Arguments, skip: Collection[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Run all checks; return the results by name, and the problems."""
    checks: list[tuple[str, Callable[[Arguments], Any], tuple[str, ...]]] = [
        ("packages", require_trackers, ("report_to",)),
        ("launcher", require_launcher, ("deepspeed",)),
        ("optimizer", require_optimizer, ("optim",)),
        ("compiler", require_compiler, ("torch_compile_backend",)),
        ("bits", require_bits, ("bits",)),
        ("liger", require_liger, ("use_liger_kernel",)),
        ("output", require_output, ("output_dir",)),
        ("records", _load_records, ("data_path", "eval_data_path", "eval_fraction", "image_folder")),
        ("source", open_source, _SOURCE_FLAGS),
        ("text", _load_text, ("model_name_or_path",)),
        ("projector", _require_projector, ("mm_projector_type", "mm_projector_kwargs", "pretrain_mm_mlp_adapter")),
        ("generation_config", require_generation_config, ("model_name_or_path",)),
    ]
    results: dict[str, Any] = {}
    problems: list[str] = []
    model = arguments.model
    use_cache_if_unreachable([model.model_name_or_path, *([] if arguments.data.feature_cache else model.vision_tower)])

    def attempt(name: str, check: Callable[[], Any]) -> None:
        try:
            results[name] = check()
        except UserError as error:
            problems.append(str(error))

    for name, check, flags in checks:
        if not set(flags) & set(skip):
            attempt(name, partial(check, arguments))
    if "records" in results and "source" in results:
        source = results["source"]
        results["records"] = [source.usable(part) for part in results["records"]]
        for part in results["records"]:
            attempt("covered", partial(source.require, part.images))
    return results, problems


def _projector_spec(arguments: Arguments, feature_shape: tuple[int, int], config: Any) -> ProjectorSpec:
    patches, width = feature_shape
    hidden = config.get_text_config().hidden_size
    model = arguments.model
    return ProjectorSpec(model.mm_projector_type, patches, width, hidden, model.projector_kwargs)


def _build(spec: ProjectorSpec, arguments: Arguments) -> tuple[torch.nn.Module, int]:
    """Return the projector and its number of image tokens."""
    # Directly before the initial weights are drawn, so that nothing that was loaded before changes them.
    set_seed(arguments.training.seed)
    projector = build_projector(spec.kind, spec.tower_width, spec.llm_width, spec.patches, spec.kwargs)
    tokens = check_projector(projector, spec)
    if tokens != spec.patches:
        logger.info("%s: %s from %d patch features", spec.kind, counted(tokens, "image token"), spec.patches)
    if arguments.model.pretrain_mm_mlp_adapter is not None:
        load_weights(arguments.model.pretrain_mm_mlp_adapter, projector)
    return projector, tokens


def _require_projector(arguments: Arguments) -> None:
    model = arguments.model
    require_projector(model.mm_projector_type, model.projector_kwargs)
    adapter = model.pretrain_mm_mlp_adapter
    if adapter is not None and not Path(adapter).is_file():
        raise UserError(f"--pretrain_mm_mlp_adapter {adapter} does not exist or is not a file")


def _load_records(arguments: Arguments) -> tuple[Records, Records]:
    data = arguments.data
    records = load_records(data.data_path, image_folder=data.image_folder)
    if data.eval_data_path is not None:
        return records, load_records(data.eval_data_path, "--eval_data_path", data.image_folder)
    held_out = round(data.eval_fraction * len(records))
    if not held_out:
        return records, records[:0]
    # A generator of its own keeps the draws of the sample order independent of --eval_fraction.
    chosen = np.array(random.Random(arguments.training.seed).sample(range(len(records)), held_out), np.int64)
    is_held_out = np.zeros(len(records), bool)
    is_held_out[chosen] = True
    return records.select(np.flatnonzero(~is_held_out)), records.select(np.flatnonzero(is_held_out))


def _template(arguments: Arguments, tokenizer: Any, image_tokens: int) -> PlainTemplate:
    training = arguments.training
    captions = load_caption_tokenizer(arguments.model.model_name_or_path, tokenizer, training.cache_dir)
    return PlainTemplate(captions, training.model_max_length, image_tokens, arguments.data.drop_unk_tokens)


def _require_fitting_rows(config: Any, parts: Sequence[Records], template: PlainTemplate, rows: RowLengths) -> None:
    embeddings = config.get_text_config().vocab_size
    outside = find_id_out_of_range(parts, template, embeddings)
    check_data_fits(
        config,
        longest_positions=rows.longest - 1 + template.image_tokens,
        longest_record=_record_name(parts, rows.record),
        largest_id=embeddings - 1 if outside is None else outside.id,
        largest_id_record=_record_name(parts, rows.record if outside is None else outside.record),
    )


def _record_name(parts: Sequence[Records], position: int) -> str:
    # By image and caption: positions here are not those of the data file if records are held out or dropped.
    record = record_at(parts, position)
    return f"of {record.image} ({short_repr(record.caption)})"
