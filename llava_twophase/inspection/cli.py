"""Command 3: inspect a feature cache. Flags only; modules are imported when their subcommand runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from llava_twophase.command_line import CommandParser, Integer
from llava_twophase.errors import UserError, run_command

_CACHE = "caches/clip-l-336"
_ABSOLUTE = "folder to which absolute image paths of the records are made relative"
_IMAGES = "--image_folder playground/data/LLaVA-Pretrain/images"
_DATA = "--data_path playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
_KEY = "00453/004539375.jpg"
_FORMATS = ("npz", "safetensors", "pt")
_MOST_IN_REPORT = 500


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.

    Returns:
        0 done, 1 a problem was found, 2 wrong usage, 130 interrupted, 141 nobody reads the output.
    """
    return run_command(lambda: _run(argv), interrupted="interrupted: an inspection resumes nothing; run it again")


def _run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # run_command decides
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else "the output cannot be written: "
        raise UserError(f"{where}{error.strerror or error}") from error
    return code


def build_parser() -> CommandParser:
    """Return the command's argument parser."""
    parser = CommandParser(
        prog="llava-inspect-cache",
        description="Inspect a feature cache: a folder or a URL. Only repair changes it. Only verify, "
        "repair, push and pull read all of it.",
        **_example(f"summary {_CACHE}"),
    )
    commands = parser.add_subparsers()
    for add in (_add_summary, _add_coverage, _add_stats, _add_compare, _add_reencode, _add_show, _add_report, _add_head,
                _add_export, _add_verify, _add_repair, _add_transfers):  # fmt: skip
        add(commands)
    return parser


def _add_summary(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from llava_twophase.inspection import summary

        return summary.run(args.cache, args.json)

    parser = _subcommand(commands, "summary", run, "show what made a cache and how large it is", "")
    _json(parser)


def _add_coverage(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from llava_twophase.inspection import coverage

        return coverage.run(
            args.cache, args.data_path, image_folder=args.image_folder, llm=args.model_name_or_path,
            model_max_length=args.model_max_length, image_tokens=args.image_tokens, as_json=args.json,
        )  # fmt: skip

    text = "compare records with features; exit 1 if records have none"
    parser = _subcommand(commands, "coverage", run, text, _DATA)
    parser.add_argument("--data_path", required=True, help="records: LLaVA's JSON, JSON Lines or Parquet")
    parser.add_argument("--image_folder", help=_ABSOLUTE)
    parser.add_argument("--model_name_or_path", help="LLM whose tokenizer counts the captions that would be truncated")
    parser.add_argument("--model_max_length", type=Integer(1), default=2048, help="as in training (default: 2048)")
    text = "tokens of an image after the projector (default: the cache's, as with LLaVA's projectors)"
    parser.add_argument("--image_tokens", type=Integer(1), metavar="N", help=text)
    _json(parser)


def _add_stats(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from llava_twophase.inspection import statistics

        return statistics.run(args.cache, args.n, args.seed, args.plot, args.json)

    text = "show statistics of channels, tokens and images of a sample"
    parser = _subcommand(commands, "stats", run, text, "--plot stats.png")
    _sample(parser, 256)
    parser.add_argument("--plot", type=_plot, metavar="FILE", help="also plot: .png, .svg or .pdf; needs matplotlib")
    _json(parser)


def _add_compare(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from llava_twophase.inspection import compare

        return compare.run(args.cache, args.other, args.n, args.seed, args.json)

    parser = _subcommand(commands, "compare", run, "compare two caches of the same images", "caches/clip-l-336-int8")
    parser.add_argument("other", metavar="OTHER", help="the cache to compare with; errors are relative to it")
    _sample(parser, 256)
    _json(parser)


def _add_reencode(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from llava_twophase.inspection import reencode

        return reencode.run(
            args.cache, args.image_folder, args.n, args.seed,
            tower=args.vision_tower, device=args.device, as_json=args.json,
        )  # fmt: skip

    parser = _subcommand(commands, "reencode", run, "run the tower again and compare bit for bit", _IMAGES)
    _images(parser, required=True)
    parser.add_argument(
        "--vision_tower", help="hub id or folder of the tower (default: the one that the cache records)"
    )
    device = "auto (default: the GPU if there is one, else the CPU), cpu, cuda, cuda:1, ..."
    parser.add_argument("--device", default="auto", help=device)
    _sample(parser, 32)
    _json(parser)


def _add_show(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from llava_twophase.inspection import show

        return show.run(args.cache, args.keys, args.image_folder, args.output, patch=args.patch, size=args.size)

    text = "draw images and their patch features, as a PNG"
    parser = _subcommand(commands, "show", run, text, f"{_KEY} -o a.png {_IMAGES}")
    _keys(parser)
    parser.add_argument("-o", "--output", required=True, help="PNG file to write")
    _images(parser, required=True)
    text = "also show the cosine of all patches to this one"
    parser.add_argument("--patch", type=_patch, metavar="ROW,COLUMN", help=text)
    parser.add_argument(
        "--size", type=Integer(16, 4096), default=336, help="side of each panel in pixels (default: 336)"
    )


def _add_report(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from llava_twophase.inspection import report

        return report.run(args.cache, args.output, args.n, args.seed, images=args.image_folder, records=args.data_path)

    text = "write summary, coverage, statistics and images as one HTML page"
    parser = _subcommand(commands, "report", run, text, f"-o report.html {_IMAGES} {_DATA}")
    parser.add_argument("-o", "--output", required=True, help="HTML file to write; it needs no other file")
    _images(parser, required=False)
    parser.add_argument("--data_path", help="records: adds captions and coverage")
    _sample(parser, 24, most=_MOST_IN_REPORT)


def _add_head(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from llava_twophase.inspection import export

        return export.run_head(args.cache, args.key, args.json)

    parser = _subcommand(commands, "head", run, "print the first numbers of an image", _KEY)
    parser.add_argument("key", metavar="KEY", help="image key: its path relative to the image folder")
    _json(parser)


def _add_export(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from llava_twophase.inspection import export

        if not args.to and not args.output:
            parser.error("give -o FILE or --to FORMAT")
        output = args.output or f"features.{args.to}"
        suffix = output.rpartition(".")[2].lower()
        if not args.to and suffix not in _FORMATS:
            parser.error(f"-o {output}: the suffix is not a known format; add --to npz, safetensors or pt")
        return export.run_export(args.cache, args.keys, output, args.to or suffix)

    text = "write features as npz, safetensors or pt"
    parser = _subcommand(commands, "export", run, text, f"{_KEY} -o a.npz")
    _keys(parser)
    parser.add_argument("-o", "--output", help="file to write (default: features.FORMAT)")
    parser.add_argument("--to", choices=_FORMATS, help="format (default: the suffix of -o)")


def _add_verify(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from llava_twophase.inspection import check

        return check.run_verify(args.cache, args.records, args.sources, args.json)

    parser = _subcommand(commands, "verify", run, "check every bit; exit 1 and report what is wrong", "")
    parser.add_argument("--records", metavar="FILE", help="also report images of these records that have no features")
    text = "also report images in this folder or archive that were edited, replaced or deleted since extraction"
    parser.add_argument("--sources", metavar="DIR", help=text)
    _json(parser)


def _add_repair(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from llava_twophase.inspection import check

        return check.run_repair(args.cache, args.records, args.image_folder, args.dry_run, args.json)

    parser = _subcommand(commands, "repair", run, "rebuild the manifest from intact shards", "--dry_run")
    text = "mark the cache complete if it has all images of these records"
    parser.add_argument("--records", metavar="FILE", help=text)
    parser.add_argument("--image_folder", help=_ABSOLUTE)
    parser.add_argument("--dry_run", action="store_true", help="report what would be done and change nothing")
    _json(parser)


def _add_transfers(commands: Any) -> None:
    def run(args: argparse.Namespace) -> int:
        from llava_twophase.inspection import transfer

        return (transfer.run_push if args.push else transfer.run_pull)(args.cache, args.target, args.json)

    url, text = "s3://bucket/clip-l-336", "and resume an interrupted one"
    push = _subcommand(commands, "push", run, f"copy a cache to a URL, verify the copy, {text}", url)
    push.add_argument("target", metavar="URL", help="where to copy it: s3://..., gs://..., hf://datasets/USER/NAME")
    pull = _subcommand(commands, "pull", run, f"copy a cache from a URL, verify the copy, {text}", _CACHE, cache=url)
    pull.add_argument("target", metavar="FOLDER", help="folder to write")
    for parser in (push, pull):
        parser.set_defaults(push=parser is push)
        _json(parser)


def _subcommand(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    example: str,
    cache: str = _CACHE,
) -> argparse.ArgumentParser:
    description = f"{text[0].upper()}{text[1:]}."
    line = _example(f"{name} {cache} {example}".rstrip())
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=description, **line)
    parser.add_argument("cache", metavar="CACHE", help="folder or URL of the feature cache")
    parser.set_defaults(run=run)
    return parser


def _example(example: str) -> dict[str, Any]:
    text = f"example:\n  llava-inspect-cache {example}"
    return {"epilog": text, "formatter_class": argparse.RawDescriptionHelpFormatter}


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("keys", metavar="KEY", nargs="+", help="image keys: paths relative to the image folder")


def _images(parser: argparse.ArgumentParser, required: bool) -> None:
    text = "folder that image keys are relative to, or its .zip or .tar"
    parser.add_argument("--image_folder", required=required, help=text)


def _sample(parser: argparse.ArgumentParser, count: int, most: int | None = None) -> None:
    limit = f", at most {most}" if most else ""
    parser.add_argument("--n", type=Integer(1, most), default=count, help=f"images to sample (default: {count}{limit})")
    parser.add_argument("--seed", type=Integer(0, 2**63), default=0, help="seed of the sample (default: 0)")


def _patch(text: str) -> tuple[int, int]:
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError("expected a row and a column, such as 10,12") from None
    return row, column


def _plot(text: str) -> str:
    if not text.lower().endswith((".png", ".svg", ".pdf")):
        raise argparse.ArgumentTypeError("expected a name that ends in .png, .svg or .pdf")
    return text
