"""All that can be wrong with a run's inputs, found before the LLM is loaded and reported together."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, Trainer
from transformers.training_args import OptimizerNames

from llava_twophase.errors import UserError, combined_error
from llava_twophase.files import require_free_space
from llava_twophase.records import Record, image_keys, load_records
from llava_twophase.train.arguments import Arguments
from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.row_limits import RowLengths, measure_rows
from llava_twophase.train.data.source import FeatureSource, open_source
from llava_twophase.train.data.tokenizer import load_caption_tokenizer
from llava_twophase.train.model.llm_config import require_llm
from llava_twophase.train.model.load_llm import require_bits, require_generation_config, require_liger
from llava_twophase.train.model.projector import build_projector, load_projector

logger = logging.getLogger(__name__)

# AdamW in float32 keeps weight, two moments and, under DeepSpeed, a master copy; see the README on checkpoints.
_CHECKPOINT_BYTES_PER_WEIGHT = 20


@dataclass
class Inputs:
    """What a run needs besides the LLM, checked.

    Attributes:
        records: To train on.
        eval_records: To evaluate on, may be empty.
        source: Where features come from.
        config: The LLM's configuration.
        tokenizer: The LLM's tokenizer.
        template: Tokenizes captions.
        rows: How long the rows are that it makes, held-out ones included.
        projector: Freshly initialised, or from ``--pretrain_mm_mlp_adapter``.
        width: Tower width D.
    """

    records: Sequence[Record]
    eval_records: Sequence[Record]
    source: FeatureSource
    config: Any
    tokenizer: Any
    template: PlainTemplate
    rows: RowLengths
    projector: torch.nn.Module
    width: int


def check_inputs(arguments: Arguments) -> Inputs:
    """Load and check everything except the LLM's weights.

    Raises:
        UserError: All problems that were found, in one error.
    """
    checked, problems = _check(arguments)
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise combined_error(problems, f"{len(problems)} problems were found; nothing was started")
    records, eval_records = checked["records"]
    source = checked["source"]
    config, tokenizer = checked["text"]
    # The tower of an on-the-fly run is loaded last: it may be downloaded.
    tokens, width = source.load()
    template = _template(arguments, tokenizer, tokens)
    projector = build_projector(arguments.model.mm_projector_type, width, config.get_text_config().hidden_size)
    if arguments.model.pretrain_mm_mlp_adapter is not None:
        load_projector(arguments.model.pretrain_mm_mlp_adapter, projector)
    _require_space(arguments, sum(parameter.numel() for parameter in projector.parameters()))
    rows = measure_rows([*records, *eval_records], template)
    return Inputs(records, eval_records, source, config, tokenizer, template, rows, projector, width)


def find_input_problems(arguments: Arguments, skip: Collection[str] = ()) -> list[str]:
    """Return what is wrong with the inputs of a command line that has other problems too.

    Args:
        arguments: The parsed command line.
        skip: Names of flags whose value is not known; checks that need one of them are skipped.
    """
    return _check(arguments, skip)[1]


def _check(arguments: Arguments, skip: Collection[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Run all checks; return the results by name, and the problems."""
    checks: list[tuple[str, Callable[[Arguments], Any], tuple[str, ...]]] = [
        ("packages", _require_packages, ("report_to",)),
        ("launcher", _require_launcher, ("deepspeed",)),
        ("optimizer", _require_optimizer, ("optim",)),
        ("compiler", _require_compiler, ("torch_compile_backend",)),
        ("bits", require_bits, ("bits",)),
        ("liger", require_liger, ("use_liger_kernel",)),
        ("output", _require_output, ("output_dir",)),
        ("records", _load_records, ("data_path", "eval_data_path", "eval_fraction", "image_folder")),
        ("source", open_source, ("feature_cache", "image_folder", "vision_tower", "mm_vision_select_layer")),
        ("text", _load_text, ("model_name_or_path",)),
        ("generation_config", require_generation_config, ("model_name_or_path",)),
    ]
    results: dict[str, Any] = {}
    problems: list[str] = []

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
            attempt("covered", partial(source.require, image_keys(part)))
    return results, problems


def run_identity(arguments: Arguments, inputs: Inputs) -> dict[str, Any]:
    """Return what a run that goes on from a checkpoint must have in common with the one that wrote it."""
    model, training = arguments.model, arguments.training
    digest = hashlib.sha256()
    for record in inputs.records:
        digest.update(f"{record.image}\0{record.caption}\0".encode("utf-8", "surrogatepass"))
    plugin = getattr(training, "deepspeed_plugin", None)
    return {
        "world_size": training.world_size,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "zero_stage": plugin.zero_stage if plugin is not None else None,
        "dtype": str(arguments.dtype).removeprefix("torch."),
        "seed": training.seed,
        "data_seed": training.seed if training.data_seed is None else training.data_seed,
        "dataloader_drop_last": training.dataloader_drop_last,
        "group_by_modality_length": training.group_by_modality_length,
        # A checkpoint's optimizer and projector would silently win over another one of these.
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "optim": OptimizerNames(training.optim).value,
        "pretrain_mm_mlp_adapter": model.pretrain_mm_mlp_adapter,
        "drop_unk_tokens": arguments.data.drop_unk_tokens,
        "model_name_or_path": model.model_name_or_path,
        "mm_projector_type": model.mm_projector_type,
        "model_max_length": training.model_max_length,
        "tokenizer": inputs.template.tokenizer.identity,
        "records_sha256": digest.hexdigest(),
        "features": inputs.source.identity,
    }


def _require_packages(arguments: Arguments) -> None:
    report_to = arguments.training.report_to
    names = [report_to] if isinstance(report_to, str) else report_to or []
    missing = [name for name in names if name in ("wandb", "tensorboard", "trackio") and find_spec(name) is None]
    if missing:
        raise UserError(
            f"--report_to {' '.join(missing)}: pip install {' '.join(missing)} first, or use --report_to none"
        )


def _require_launcher(arguments: Arguments) -> None:
    # Without a launcher's variables DeepSpeed asks MPI, and fails after the LLM was loaded.
    if arguments.training.deepspeed and "RANK" not in os.environ and find_spec("mpi4py") is None:
        raise UserError(
            "--deepspeed needs a launcher: deepspeed pipelines/train_projector.py ..., or torchrun; for one process, "
            "leave --deepspeed out"
        )


def _require_optimizer(arguments: Arguments) -> None:
    training = arguments.training
    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except (ImportError, ValueError) as error:
        raise UserError(f"--optim {OptimizerNames(training.optim).value}: {error}; or leave it out") from None


def _require_compiler(arguments: Arguments) -> None:
    training = arguments.training
    backends = torch.compiler.list_backends(exclude_tags=())
    if training.torch_compile and training.torch_compile_backend not in backends:
        raise UserError(f"--torch_compile_backend {training.torch_compile_backend}: torch has {', '.join(backends)}")


def _require_output(arguments: Arguments) -> None:
    folder = Path(str(arguments.training.output_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be made: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder} is not writable; give another one")


def _require_space(arguments: Arguments, weights: int) -> None:
    folder = Path(str(arguments.training.output_dir))
    training = arguments.training
    # The new checkpoint is written before the oldest goes.
    kept = 1 + (training.save_total_limit or 2) if training.save_strategy != "no" else 1
    needed = kept * weights * _CHECKPOINT_BYTES_PER_WEIGHT
    require_free_space(
        folder, needed, what=f"{kept} checkpoints", advice="free some space, or lower --save_total_limit"
    )


def _load_records(arguments: Arguments) -> tuple[list[Record], list[Record]]:
    data = arguments.data
    records = load_records(data.data_path, image_folder=data.image_folder)
    if data.eval_data_path is not None:
        return records, load_records(data.eval_data_path, "--eval_data_path", data.image_folder)
    held_out = round(data.eval_fraction * len(records))
    if not held_out:
        return records, []
    # By its own generator, so that a held-out part leaves the training order's draws as they are.
    chosen = set(random.Random(arguments.training.seed).sample(range(len(records)), held_out))
    train = [record for position, record in enumerate(records) if position not in chosen]
    return train, [records[position] for position in sorted(chosen)]


def _load_text(arguments: Arguments) -> tuple[Any, Any]:
    name, cache_dir = arguments.model.model_name_or_path, arguments.training.cache_dir
    config = require_llm(name, _from_hub(AutoConfig, name, cache_dir))
    return config, _from_hub(AutoTokenizer, name, cache_dir)


def _from_hub(kind: Any, name: str, cache_dir: str | None) -> Any:
    try:
        return kind.from_pretrained(name, cache_dir=cache_dir)
    except Exception as error:  # these files may hold anything, so errors are of many types
        raise UserError(
            f"--model_name_or_path {name}: its config or tokenizer cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _template(arguments: Arguments, tokenizer: Any, image_tokens: int) -> PlainTemplate:
    training = arguments.training
    captions = load_caption_tokenizer(arguments.model.model_name_or_path, tokenizer, training.cache_dir)
    return PlainTemplate(captions, training.model_max_length, image_tokens, arguments.data.drop_unk_tokens)
