"""Command 1, phase one: images to a feature cache. The steps are in ``run.py``, the loop in ``pipeline.py``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from llava_twophase.cache.format import QUANTISED
from llava_twophase.distributed import Ranks, ranks_from_environment
from llava_twophase.errors import UserError, run_command
from llava_twophase.records import load_records

COMPUTE_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
STORAGE_DTYPES = {**COMPUTE_DTYPES, "int8": "int8", "int4": "int4"}

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
        0 done, 1 a problem was found, 2 wrong usage (raised by argparse), 130 interrupted.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.json and not args.plan:
        parser.error("--json goes with --plan")
    if args.llm and not args.plan:
        parser.error("--llm goes with --plan")
    if args.runs and not args.llm:
        parser.error("--runs goes with --llm")
    ranks = ranks_from_environment()
    level = logging.INFO if ranks.is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    return run_command(lambda: _run(args, ranks))


def build_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(
        prog="llava-extract-features",
        description="Phase one: run the vision tower once over the images and keep its patch features on disk. "
        "Run it again to go on after a kill, or to add the images of new records.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data_path", required=True, help="records, LLaVA's JSON list or JSON lines")
    add(
        "--image_folder",
        required=True,
        help="what the records' image paths are relative to: a folder, or a .zip or uncompressed .tar of one",
    )
    add("--vision_tower", required=True, help="CLIP, SigLIP or DINOv2 tower: hub id or local folder")
    add("--feature_cache", required=True, help="folder of the cache, made where absent, continued where present")
    add("--mm_vision_select_layer", type=int, default=-2, help="hidden state to keep (default: -2, the last but one)")
    add("--mm_vision_select_feature", choices=("patch", "cls_patch"), default="patch", help="patch drops the CLS token")
    add("--image_aspect_ratio", choices=("square", "pad"), default="square", help="as in LLaVA (default: square)")
    add("--compute_dtype", choices=tuple(COMPUTE_DTYPES), default="bf16", help="of the tower (default: bf16)")
    add(
        "--storage_dtype",
        choices=("auto", *STORAGE_DTYPES),
        default="auto",
        help="of the cache: the compute dtype, exactly (auto), or int8 or int4, half and 28 %% of bf16's size",
    )
    add("--batch_size", type=_positive, default=32, help="images of one forward pass (default: 32)")
    add(
        "--num_workers",
        type=_not_negative,
        default=min(8, os.cpu_count() or 1),
        help="decoding processes (default: one a core)",
    )
    add(
        "--on_bad_image",
        choices=("fail", "skip"),
        default="fail",
        help="fail (default): name all images that cannot be used and stop, before the tower loads where that can be "
        "known; skip: leave them out and list them in the cache's quarantine.jsonl",
    )
    add("--images_per_shard", type=_positive, default=1024, help="rows of one HDF5 file (default: 1024)")
    add("--device", default="auto", help="auto (default: this rank's GPU, else the CPU), cpu, cuda, cuda:1, ...")
    add("--plan", action="store_true", help="say what is to do, how large and how long, write nothing, and stop")
    add("--json", action="store_true", help="with --plan: as one JSON object")
    add(
        "--llm",
        help="with --plan: say when the cache pays beside training this LLM: 135M, 0.5B, 1.1B, 7B, 13B, or a model",
    )
    add("--runs", type=_positive, help="with --llm: training runs of one epoch that will use the cache (default: 3)")
    return parser


def storage_dtype(compute: str, storage: str) -> str:
    """Choose the storage dtype.

    Args:
        compute: ``--compute_dtype``.
        storage: ``--storage_dtype``.

    Returns:
        Its long name.

    Raises:
        UserError: It would round what the tower computed, without int8's and int4's scales.
    """
    if storage in ("auto", compute) or storage in QUANTISED or storage == "fp32":
        return STORAGE_DTYPES[compute if storage == "auto" else storage]
    raise UserError(
        f"--storage_dtype {storage} cannot hold {compute} features exactly; use --compute_dtype {storage}, or "
        f"--storage_dtype {compute}, or int8 for half the size"
    )


def _run(args: argparse.Namespace, ranks: Ranks) -> int:
    args.compute = COMPUTE_DTYPES[args.compute_dtype]
    args.storage = storage_dtype(args.compute_dtype, args.storage_dtype)
    records = load_records(args.data_path, image_folder=args.image_folder)
    # torch is imported only now, so that --help and bad records answer at once.
    from llava_twophase.extract.run import run

    return run(args, records, ranks)


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
