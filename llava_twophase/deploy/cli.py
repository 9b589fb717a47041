"""Command ``llava-use-projector``: captions, evaluation and export of a trained projector."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from llava_twophase.command_line import CommandParser, Integer
from llava_twophase.errors import run_command

# torch and transformers are imported when a subcommand runs, so that --help answers at once.

_EXAMPLE = """\
examples:
  llava-use-projector caption  checkpoints/llava-v1.5-13b-pretrain image.jpg
  llava-use-projector evaluate runs/a runs/b --data_path held_out.json --image_folder images --html report.html
  llava-use-projector export   checkpoints/llava-v1.5-13b-pretrain exported --to hf
  llava-use-projector handover checkpoints/llava-v1.5-13b-pretrain
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.

    Returns:
        0 done, 1 a problem was found, 2 wrong usage, 130 interrupted.
    """
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return _COMMANDS[args.command](args)


def build_parser() -> CommandParser:
    """Return the command's argument parser."""
    parser = CommandParser(
        prog="llava-use-projector",
        description="Use a trained mm_projector.bin: caption images, evaluate runs, export to other systems.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers()
    _add_caption(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_handover(commands)
    return parser


def _add_caption(commands: Any) -> None:
    example = "caption runs/a photo.jpg holiday/ --html captions.html"
    parser = _subcommand(commands, "caption", "caption images", example)
    _add_run(parser)
    images = "image file, folder, .zip, .tar, or a .json, .jsonl or .parquet file of records"
    parser.add_argument("images", metavar="IMAGE", nargs="+", help=images)
    _add_sources(parser)
    _add_placement(parser)
    add = parser.subject("captions")
    add("--batch_size", type=Integer(1), default=8, help="images of one batch (default: 8)")
    add("--html", metavar="FILE", help="also write a page with thumbnails")
    add("--json", action="store_true", help="print one JSON object per image")


def _add_evaluate(commands: Any) -> None:
    example = "evaluate runs/a runs/b --data_path held_out.json --feature_cache caches/clip-l-336 --html report.html"
    parser = _subcommand(commands, "evaluate", "measure runs on held-out records", example)
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="--output_dir of a training run, or a projector file; several are compared",
    )
    data_path = "held-out records: LLaVA's JSON, JSON Lines or Parquet"
    parser.add_argument("--data_path", required=True, help=data_path)
    _add_models(parser)
    _add_sources(parser)
    _add_placement(parser)
    add = parser.subject("evaluation")
    add("--batch_size", type=Integer(1), default=8, help="rows of one forward pass (default: 8)")
    add("--limit", type=Integer(1), default=256, help="records to evaluate, drawn at random (default: 256)")
    add("--candidates", type=Integer(2), default=10, help="captions that each image is ranked against (default: 10)")
    add("--seed", type=int, default=0, help="seed of the records, candidates and bootstrap resamples (default: 0)")
    add("--html", metavar="FILE", help="also write a report as one HTML page")
    add("--json", action="store_true", help="print one JSON object")


def _add_export(commands: Any) -> None:
    parser = _subcommand(
        commands, "export", "write the model in another system's format", "export runs/a exported --to hf"
    )
    _add_run(parser)
    parser.add_argument("out", metavar="OUT", help="folder (hf) or file (gguf) to write")
    parser.add_argument(
        "--to",
        required=True,
        choices=("hf", "gguf"),
        help="hf: folder for transformers' LlavaForConditionalGeneration and vLLM; gguf: mmproj file for llama.cpp",
    )


def _add_handover(commands: Any) -> None:
    text = "check what LLaVA's stage 2 needs, print its command"
    parser = _subcommand(commands, "handover", text, "handover runs/a")
    _add_run(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _subcommand(commands: Any, name: str, text: str, example: str) -> CommandParser:
    parser: CommandParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  llava-use-projector {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_run(parser: CommandParser) -> None:
    parser.add_argument("run", metavar="RUN", help="--output_dir of a training run, or a projector file")
    _add_models(parser)


def _add_models(parser: CommandParser) -> None:
    add = parser.subject("models")
    add("--model_name_or_path", help="base LLM (default: that of config.json next to the projector)")
    add(
        "--vision_tower",
        action="append",
        help="vision tower (default: that of config.json); repeat the flag for joined towers",
    )
    add(
        "--mm_vision_select_layer",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="hidden state of the tower, or several (default: config.json's, else -2)",
    )
    add("--mm_vision_select_feature", choices=("patch", "cls_patch"), help="default: config.json's, else patch")
    add("--image_aspect_ratio", choices=("square", "pad"), help="default: config.json's, else square")


def _add_sources(parser: CommandParser) -> None:
    add = parser.subject("images and features")
    add("--image_folder", help="folder, .zip or .tar of the records' images")
    add(
        "--feature_cache",
        action="append",
        help="feature cache; images that it has need no vision tower. For joined towers, repeat the flag in order",
    )


def _add_placement(parser: CommandParser) -> None:
    add = parser.subject("device and precision")
    add("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="dtype of the LLM (default: as trained, else fp32)")
    add(
        "--bits",
        type=int,
        choices=(4, 8, 16),
        default=16,
        help="4 or 8: quantize the LLM with bitsandbytes (default: 16)",
    )


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "llm": args.model_name_or_path,
        "vision_tower": args.vision_tower,
        "select_layer": args.mm_vision_select_layer,
        "select_feature": args.mm_vision_select_feature,
        "image_aspect_ratio": args.image_aspect_ratio,
    }


def _caption(args: argparse.Namespace) -> int:
    from llava_twophase.deploy.caption import CaptionOptions, caption
    from llava_twophase.deploy.captioner import Placement
    from llava_twophase.deploy.trained_projector import find_projector

    options = CaptionOptions(
        image_folder=args.image_folder,
        feature_cache=args.feature_cache,
        batch_size=args.batch_size,
        html=args.html,
        json=args.json,
    )
    placement = Placement(args.device, args.dtype, args.bits)
    return caption(find_projector(args.run, **_overrides(args)), args.images, placement, options)


def _evaluate(args: argparse.Namespace) -> int:
    from llava_twophase.deploy.captioner import Placement
    from llava_twophase.deploy.evaluate import EvaluationSettings
    from llava_twophase.deploy.evaluation_report import EvaluationOptions, evaluate_runs
    from llava_twophase.deploy.trained_projector import find_projector

    options = EvaluationOptions(
        data_path=args.data_path,
        image_folder=args.image_folder,
        feature_cache=args.feature_cache,
        limit=args.limit,
        html=args.html,
        json=args.json,
        settings=EvaluationSettings(args.batch_size, args.candidates, args.seed),
    )
    runs = {run: find_projector(run, **_overrides(args)) for run in args.runs}
    return evaluate_runs(runs, Placement(args.device, args.dtype, args.bits), options)


def _export(args: argparse.Namespace) -> int:
    from llava_twophase.deploy.export import export
    from llava_twophase.deploy.trained_projector import find_projector

    return export(find_projector(args.run, **_overrides(args)), args.to, args.out)


def _handover(args: argparse.Namespace) -> int:
    from llava_twophase.deploy.handover import handover
    from llava_twophase.deploy.trained_projector import find_projector

    return handover(find_projector(args.run, **_overrides(args)), args.json)


_COMMANDS = {"caption": _caption, "evaluate": _evaluate, "export": _export, "handover": _handover}
