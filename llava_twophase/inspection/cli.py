"""Command 3: look at a feature cache. Flags only; each subcommand is a module beside this file."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from llava_twophase.errors import run_command

# Modules are imported when their subcommand runs, so that --help answers at once.

_CACHE = "caches/clip-l-336"
_IMAGES = "--image_folder playground/data/LLaVA-Pretrain/images"
_DATA = "--data_path playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
_KEY = "00453/004539375.jpg"
SUBCOMMANDS = {
    "summary": ("summary:run", "what made it and how large it is", f"summary {_CACHE}"),
    "coverage": ("coverage:run", "records beside features; exit 1 where some lack them", f"coverage {_CACHE} {_DATA}"),
    "stats": ("statistics:run", "channels, tokens and images of a sample", f"stats {_CACHE} --plot stats.png"),
    "compare": ("compare:run", "two caches of the same images", f"compare {_CACHE} caches/clip-l-336-int8"),
    "reencode": ("reencode:run", "run the tower again and compare bit for bit", f"reencode {_CACHE} {_IMAGES}"),
    "show": ("show:run", "images beside their patch features, as a PNG", f"show {_CACHE} {_KEY} -o a.png {_IMAGES}"),
    "report": ("report:run", "all of it as one HTML page", f"report {_CACHE} -o report.html {_IMAGES} {_DATA}"),
    "head": ("export:run_head", "an image's first numbers", f"head {_CACHE} {_KEY}"),
    "export": ("export:run_export", "features as npz, safetensors or pt", f"export {_CACHE} {_KEY} -o a.npz"),
    "verify": ("check:run_verify", "check every bit; exit 1 and name what is wrong", f"verify {_CACHE}"),
    "repair": ("check:run_repair", "make the manifest anew from whole shards", f"repair {_CACHE} --dry_run"),
}
"""Subcommand: where it is, what it does, and an example."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.

    Returns:
        0 done, 1 a problem was found, 2 wrong usage (raised by argparse), 130 interrupted.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "export":
        if not args.to and not args.output:
            parser.error("give -o FILE or --to FORMAT")
        args.output = args.output or f"features.{args.to}"
        args.to = args.to or _suffix(parser, args.output)
    module, _, function = SUBCOMMANDS[args.command][0].partition(":")

    def command() -> int:
        return int(getattr(importlib.import_module(f"llava_twophase.inspection.{module}"), function)(args))

    return run_command(command)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(
        prog="llava-inspect-cache",
        description="Look at a feature cache. Only repair changes it; only verify and repair read all of it.",
        **_texts(SUBCOMMANDS["summary"][2]),
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(SUBCOMMANDS)}}}")
    add = {name: _subcommand(commands, name) for name in SUBCOMMANDS}
    for name in ("summary", "coverage", "stats", "compare", "reencode", "head", "verify", "repair"):
        add[name]("--json", action="store_true", help="print one JSON object")
    _sampling(add)
    add["coverage"]("--data_path", required=True, help="records, LLaVA's JSON list or JSON lines")
    add["coverage"]("--model_name_or_path", help="LLM whose tokenizer counts the captions that would be truncated")
    add["coverage"]("--model_max_length", type=_positive, default=2048, help="as in training (default: 2048)")
    add["stats"]("--plot", type=_plot, metavar="FILE", help="draw it too: .png, .svg or .pdf; needs matplotlib")
    add["compare"]("other", metavar="OTHER", help="the cache to compare with, what errors are relative to")
    add["reencode"]("--vision_tower", help="where the tower is now (default: where provenance says)")
    add["reencode"]("--device", default="auto", help="auto (default: the GPU, else the CPU), cpu, cuda, cuda:1, ...")
    _images(add["reencode"], required=True)
    add["show"]("keys", metavar="KEY", nargs="+", help="image keys: paths relative to the image folder")
    add["show"]("-o", "--output", required=True, help="PNG file to write")
    _images(add["show"], required=True)
    add["show"]("--patch", type=_patch, metavar="ROW,COLUMN", help="also show how similar all patches are to this one")
    add["show"]("--size", type=_size, default=336, help="side of each panel in pixels (default: 336)")
    add["report"]("-o", "--output", required=True, help="HTML file to write: one file, nothing beside it")
    _images(add["report"], required=False)
    add["report"]("--data_path", help="records: adds captions and coverage")
    add["head"]("key", metavar="KEY", help="image key: its path relative to the image folder")
    add["export"]("keys", metavar="KEY", nargs="+", help="image keys: paths relative to the image folder")
    add["export"]("-o", "--output", help="file to write (default: features and the format)")
    add["export"]("--to", choices=("npz", "safetensors", "pt"), help="its format (default: what its name ends in)")
    add["verify"]("--records", metavar="FILE", help="also find images of these records without features")
    add["verify"]("--sources", metavar="DIR", help="also find images edited, missing or replaced since, in this folder")
    add["repair"]("--records", metavar="FILE", help="where all their images are there, the cache counts as complete")
    add["repair"]("--dry_run", action="store_true", help="say what would be done and change nothing")
    return parser


def _sampling(add: dict[str, Any]) -> None:
    for name, count in {"stats": 256, "compare": 256, "reencode": 32, "report": 24}.items():
        add[name]("--n", type=_positive, default=count, help=f"images to sample (default: {count})")
        add[name]("--seed", type=int, default=0, help="picks them (default: 0)")


def _images(add: Any, required: bool) -> None:
    add("--image_folder", required=required, help="folder that image keys are relative to, or its .zip or .tar")


def _subcommand(commands: Any, name: str) -> Any:
    _, text, example = SUBCOMMANDS[name]
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", **_texts(example))
    parser.add_argument("cache", metavar="CACHE", help="folder of the feature cache")
    return parser.add_argument


def _texts(example: str) -> dict[str, Any]:
    text = f"example:\n  llava-inspect-cache {example}"
    return {"epilog": text, "formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}


def _suffix(parser: argparse.ArgumentParser, path: str) -> str:
    suffix = path.rpartition(".")[2].lower()
    if suffix not in ("npz", "safetensors", "pt"):
        parser.error(f"-o {path} ends in no known format; give --to npz, safetensors or pt")
    return suffix


def _patch(text: str) -> tuple[int, int]:
    row, column = (int(part) for part in text.split(","))
    return row, column


def _plot(text: str) -> str:
    if not text.lower().endswith((".png", ".svg", ".pdf")):
        raise argparse.ArgumentTypeError(f"{text} does not end in .png, .svg or .pdf")
    return text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _size(text: str) -> int:
    value = int(text)
    if not 16 <= value <= 4096:
        raise argparse.ArgumentTypeError(f"{value} is not between 16 and 4096")
    return value
