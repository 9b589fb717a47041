"""Command 1, phase one: images to a feature cache. The steps are in ``run.py``, the loop in ``pipeline.py``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava_twophase.cache.format import QUANTISED
from llava_twophase.command_line import CommandParser, Integer, boolean, problems_error
from llava_twophase.cpu import available_cpus
from llava_twophase.distributed import ranks_from_environment
from llava_twophase.errors import UserError, raise_on_termination, run_command
from llava_twophase.extract.config import ExtractConfig
from llava_twophase.extract.inputs import load_inputs
from llava_twophase.layers import as_layers
from llava_twophase.memory import is_out_of_memory
from llava_twophase.multi_scale import DEFAULT_SCALES, parse_scales
from llava_twophase.records import Records
from llava_twophase.versions import require_supported

COMPUTE_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
STORAGE_DTYPES = {**COMPUTE_DTYPES, "int8": "int8", "int4": "int4"}

_INPUTS = ("data_path", "image_folder", "vision_tower", "feature_cache")
_EXAMPLE = """\
example:
  llava-extract-features \\
      --data_path playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json \\
      --image_folder playground/data/LLaVA-Pretrain/images \\
      --vision_tower openai/clip-vit-large-patch14-336 --feature_cache caches/clip-l-336
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.

    Returns:
        0 done, 1 a problem was found, 2 wrong usage, 130 interrupted by Ctrl-C, 143 by SIGTERM, 138 by SIGUSR1.
    """
    return run_command(lambda: _run(argv))


def build_parser() -> CommandParser:
    """Return the command's argument parser."""
    parser = CommandParser(
        prog="llava-extract-features",
        description="Phase one: run the vision tower once over the images and store its patch features on disk. "
        "Run the same command again to resume an interrupted extraction, or to add the images of new records.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_input_flags(parser.subject("images and cache"))
    _add_feature_flags(parser.subject("features"))
    _add_work_flags(parser.subject("work"))
    _add_plan_flags(parser.subject("plan"))
    return parser


def _add_input_flags(add: Callable[..., Any]) -> None:
    add("--data_path", required=True, metavar="RECORDS", help="records: LLaVA's JSON list, JSON Lines or Parquet")
    add(
        "--image_folder",
        required=True,
        metavar="FOLDER",
        help="folder that the records' image paths are relative to, or a .zip or uncompressed .tar of it",
    )
    add(
        "--vision_tower",
        required=True,
        metavar="TOWER",
        help="vision tower, such as CLIP, SigLIP or DINOv2 (docs/towers.md has all): hub id or local folder",
    )
    add(
        "--feature_cache",
        required=True,
        metavar="CACHE",
        help="directory of the cache; it is created, resumed or extended",
    )


def _add_feature_flags(add: Callable[..., Any]) -> None:
    add(
        "--mm_vision_select_layer",
        type=int,
        nargs="+",
        default=[-2],
        metavar="LAYER",
        help="hidden state to store (default: -2, the second to last); several are concatenated on channels",
    )
    add("--mm_vision_select_feature", choices=("patch", "cls_patch"), default="patch", help="patch drops the CLS token")
    add("--image_aspect_ratio", choices=("square", "pad"), default="square", help="as in LLaVA (default: square)")
    add("--s2", type=boolean, default=False, metavar="BOOL", help="True: multi-scale features, as in LLaVA's S2 mode")
    add("--s2_scales", default=DEFAULT_SCALES, help=f"with --s2 True: sides in pixels (default: {DEFAULT_SCALES})")
    add("--compute_dtype", choices=tuple(COMPUTE_DTYPES), default="bf16", help="dtype of the tower (default: bf16)")
    add(
        "--storage_dtype",
        choices=("auto", *STORAGE_DTYPES),
        default="auto",
        help="dtype of the cache: auto (default) stores the compute dtype exactly; int8 and int4 take 50 %% and 28 %% "
        "of bf16's size",
    )


def _add_work_flags(add: Callable[..., Any]) -> None:
    add("--batch_size", type=Integer(1), default=32, help="images of one forward pass (default: 32)")
    add(
        "--num_workers",
        type=Integer(0),
        default=min(8, available_cpus()),
        help="processes that decode images (default: one per available CPU, at most 8)",
    )
    add(
        "--on_bad_image",
        choices=("fail", "skip"),
        default="fail",
        help="fail (default): report all images that cannot be used and stop, before the tower loads if the first "
        "bytes of the files show it; skip: list them in the cache's quarantine.jsonl and continue",
    )
    add("--images_per_shard", type=Integer(1), default=1024, help="rows of one HDF5 file (default: 1024)")
    add("--device", default="auto", help="auto (default: this rank's GPU, else the CPU), cpu, cuda, cuda:1, ...")


def _add_plan_flags(add: Callable[..., Any]) -> None:
    add("--plan", action="store_true", help="report work, disk space and time, write nothing, and stop")
    add("--json", action="store_true", help="with --plan: print one JSON object, with all images that cannot be used")
    add(
        "--llm",
        help="with --plan: compute when the cache breaks even for training this LLM: 135M, 0.5B, 1.1B, 7B, 13B, or a "
        "model",
    )
    add("--runs", type=Integer(1), help="with --llm: training runs of one epoch that will use the cache (default: 3)")


def make_config(args: argparse.Namespace) -> ExtractConfig:
    """Make the settings from parsed arguments.

    Raises:
        UserError: The storage dtype cannot hold the compute dtype's values.
    """
    return ExtractConfig(
        data_path=args.data_path,
        image_folder=args.image_folder,
        vision_tower=args.vision_tower,
        feature_cache=Path(args.feature_cache),
        select_layer=as_layers(args.mm_vision_select_layer),
        select_feature=args.mm_vision_select_feature,
        image_aspect_ratio=args.image_aspect_ratio,
        s2_scales=parse_scales(args.s2, args.s2_scales),
        compute_dtype=COMPUTE_DTYPES[args.compute_dtype],
        storage_dtype=choose_storage_dtype(args.compute_dtype, args.storage_dtype),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        skip_bad=args.on_bad_image == "skip",
        images_per_shard=args.images_per_shard,
        device=args.device,
        plan=args.plan,
        json=args.json,
        llm=args.llm,
        runs=args.runs or 3,
    )


def choose_storage_dtype(compute: str, storage: str) -> str:
    """Choose the storage dtype.

    Args:
        compute: ``--compute_dtype``.
        storage: ``--storage_dtype``.

    Returns:
        Its long name.

    Raises:
        UserError: It would round the tower's values, without the scales of int8 and int4.
    """
    if storage in ("auto", compute) or storage in QUANTISED or storage == "fp32":
        return STORAGE_DTYPES[compute if storage == "auto" else storage]
    raise UserError(
        f"--storage_dtype {storage} cannot hold {compute} features exactly; use --compute_dtype {storage}, or "
        f"--storage_dtype {compute}, or int8 for half the size"
    )


def _parse(argv: Sequence[str] | None) -> tuple[ExtractConfig, Records]:
    """Make the settings and load the records; report all problems of the flags and of the inputs in one error."""
    parser = build_parser()
    args = parser.collect(argv)
    wrong_usage = [*parser.problems, *_missing_flags(args)]
    refused = _refused_values(args, parser.faulty)
    records, wrong_inputs = load_inputs(
        **{name: None if name in parser.faulty else getattr(args, name) for name in _INPUTS},
        plan=args.plan,
        other_problems=bool(wrong_usage or refused),
    )
    problems = [*wrong_usage, *refused, *wrong_inputs]
    if problems:
        raise problems_error(problems, parser.usage_line() if wrong_usage else None)
    return make_config(args), records


def _missing_flags(args: argparse.Namespace) -> list[str]:
    needs = (
        ("--json", args.json, "--plan", args.plan),
        ("--llm", args.llm, "--plan", args.plan),
        ("--runs", args.runs, "--llm", args.llm),
    )
    return [f"{flag} needs {other}" for flag, given, other, other_given in needs if given and not other_given]


def _refused_values(args: argparse.Namespace, faulty: Collection[str]) -> list[str]:
    checks: list[Callable[[], object]] = []
    if "s2" not in faulty:
        checks.append(partial(parse_scales, args.s2, args.s2_scales))
    if not {"compute_dtype", "storage_dtype"} & set(faulty):
        checks.append(partial(choose_storage_dtype, args.compute_dtype, args.storage_dtype))
    # These import torch, which takes seconds.
    if args.device not in ("auto", "cpu"):
        from llava_twophase.devices import choose_device

        checks.append(partial(choose_device, args.device))
    if args.llm and args.plan:
        from llava_twophase.extract.break_even import llm_config

        checks.append(partial(llm_config, args.llm))
    problems = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems


def _run(argv: Sequence[str] | None) -> int:
    ranks = ranks_from_environment()
    level = logging.INFO if ranks.is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    require_supported("torch", "transformers")
    config, records = _parse(argv)
    # torch is imported only now, so that --help and wrong inputs are answered at once.
    from llava_twophase.extract.run import run

    try:
        with raise_on_termination():
            return run(config, records, ranks)
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory ({str(error).partition(chr(10))[0] or type(error).__name__}); lower --num_workers or "
            "--batch_size, then run the same command again: sealed shards are kept"
        ) from None
