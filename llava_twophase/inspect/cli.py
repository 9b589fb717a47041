"""Command 3: look at a feature cache without changing it. Flags only; what they show is made beside this file."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_twophase.errors import UserError, run_command

# Imports that cost time stand in the functions, so that --help answers at once.

_EXAMPLES = {
    "": "llava-inspect-cache summary caches/clip-l-336",
    "summary": "llava-inspect-cache summary caches/clip-l-336 --json",
    "verify": "llava-inspect-cache verify caches/clip-l-336",
    "show": "llava-inspect-cache show caches/clip-l-336 00453/004539375.jpg -o picture.png "
    "--image_folder playground/data/LLaVA-Pretrain/images",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.

    Returns:
        0 done, 1 a problem was found, 2 wrong usage (raised by argparse), 130 interrupted.
    """
    args = build_parser().parse_args(argv)
    return run_command(lambda: int(args.run(args)))


def build_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(
        prog="llava-inspect-cache",
        description="Look at a feature cache. Nothing is changed, and only verify reads all of it.",
        **_texts(""),
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{summary,verify,show}")
    add = _subcommand(commands, "summary", _summary, "what made it, how large it is, and statistics of a sample")
    add("--json", action="store_true", help="print one JSON object")
    add = _subcommand(commands, "verify", _verify, "check every bit; exit 1 and name what is wrong")
    add("--json", action="store_true", help="print one JSON object")
    add = _subcommand(commands, "show", _show, "one image beside its patch features, as a PNG")
    add("key", metavar="KEY", help="image key: its path relative to the image folder")
    add("-o", "--output", required=True, help="PNG file to write")
    add("--image_folder", required=True, help="folder that image keys are relative to, or its .zip or .tar")
    add("--size", type=_size, default=336, help="side of each of the three panels in pixels (default: 336)")
    return parser


def _subcommand(commands: Any, name: str, run: Any, text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", **_texts(name))
    parser.add_argument("cache", metavar="CACHE", help="folder of the feature cache")
    parser.set_defaults(run=run)
    return parser.add_argument


def _texts(name: str) -> dict[str, Any]:
    example = f"example:\n  {_EXAMPLES[name]}"
    return {"epilog": example, "formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}


def _summary(args: argparse.Namespace) -> int:
    from llava_twophase.inspect import report

    values, out = report.summary(args.cache), report.console()
    if args.json:
        out.out(json.dumps(values, allow_nan=False))
    else:
        report.print_summary(values, out)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from llava_twophase.cache.manifest import read_manifest
    from llava_twophase.cache.verify import verify
    from llava_twophase.inspect import report

    problems, out = verify(args.cache), report.console()
    ok = all(problem.note for problem in problems)
    if args.json:
        values = {"path": args.cache, "ok": ok, "problems": [asdict(problem) for problem in problems]}
        out.out(json.dumps(values))
        return 0 if ok else 1
    report.print_problems(args.cache, problems, out)
    if ok:
        manifest = read_manifest(Path(args.cache))
        checked = f"{manifest.rows:,} images in {len(manifest.shards):,} shards"
        report.print_line(f"{args.cache}: {checked}, every bit as it was written", out)
    return 0 if ok else 1


def _show(args: argparse.Namespace) -> int:
    from llava_twophase.cache.reader import FeatureCache
    from llava_twophase.inspect import pictures, report
    from llava_twophase.vision.images import BadImage, decode, open_images

    cache = FeatureCache(args.cache, allow_incomplete=True)
    row = report.find_row(cache, args.key)
    features = cache.values([args.key])[0]
    try:
        data = open_images(args.image_folder).read(args.key)
        picture = decode(data)
    except BadImage as error:
        raise UserError(f"{Path(args.image_folder) / args.key} {error}") from None
    if hashlib.sha256(data).digest() != cache.column("source_sha256")[row].tobytes():
        print(f"warning: {args.key} is not the file that the features were made from", file=sys.stderr)
    drawn = pictures.show(picture, features, cache.fingerprint, args.size)
    try:
        drawn.save(args.output, format="PNG")
    except OSError as error:
        raise UserError(f"-o {args.output} cannot be written: {error.strerror or error}") from None
    report.print_line(f"wrote {args.output}: {args.key}", report.console())
    return 0


def _size(text: str) -> int:
    value = int(text)
    if not 16 <= value <= 4096:
        raise argparse.ArgumentTypeError(f"{value} is not between 16 and 4096")
    return value
