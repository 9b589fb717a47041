"""``verify`` and ``repair``: a cache against its checksums, its records and its images."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from tqdm import tqdm

from llava_twophase.cache.check.repair import DAMAGED, apply_repair, plan_repair
from llava_twophase.cache.check.verify import Problem, verify
from llava_twophase.cache.format import MANIFEST, SHARDS
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.errors import UserError
from llava_twophase.extract.target import locked
from llava_twophase.inspection import output
from llava_twophase.inspection.rows import Rows
from llava_twophase.records import image_keys, load_records

_SHOWN_PROBLEMS = 100
_CHUNK = 256
_THREADS = 8


def run_verify(args: argparse.Namespace) -> int:
    """Check every bit, and what else was asked for; 1 where something is wrong."""
    # Read first: a data file that is wrong should not be found out after hours.
    keys = image_keys(load_records(args.records)) if args.records else None
    problems, out = verify(args.cache), output.console()
    checked = ["every bit as it was written"]
    # What cannot be opened has no rows to hold against anything.
    if (keys or args.sources) and all(problem.note or problem.file != MANIFEST for problem in problems):
        try:
            rows = Rows(args.cache)
            if keys:
                problems += without_features(rows, keys)
                checked.append(f"all {len(keys):,} images of {args.records} there")
            if args.sources:
                problems += changed_sources(rows, args.sources)
                checked.append(f"all files in {args.sources} unchanged")
        except UserError as error:
            if not problems:
                raise
            problems.append(Problem(args.cache, f"records and sources were not checked: {error}", "mend it first"))
    ok = all(problem.note for problem in problems)
    if args.json:
        output.print_json({"path": args.cache, "ok": ok, "problems": [asdict(problem) for problem in problems]}, out)
        return 0 if ok else 1
    _print(args.cache, problems, out)
    if ok:
        manifest = read_manifest(Path(args.cache))
        counted = f"{manifest.rows:,} images in {len(manifest.shards):,} shards"
        output.print_line(f"{args.cache}: {counted}, {', '.join(checked)}", out, "green")
    return 0 if ok else 1


def run_repair(args: argparse.Namespace) -> int:
    """Make the manifest anew; 1 where images must be extracted again."""
    out = output.console()
    keys = image_keys(load_records(args.records)) if args.records else None
    if not Path(args.cache).is_dir():
        raise UserError(f"{args.cache} is not a folder; expected a feature cache, with {MANIFEST} and {SHARDS}/")
    with ExitStack() as stack:
        if not args.dry_run and (Path(args.cache) / SHARDS).is_dir():
            stack.enter_context(locked(Path(args.cache)))
        repair = plan_repair(args.cache, keys)
        if repair.changed and not args.dry_run:
            try:
                apply_repair(args.cache, repair)
            except OSError as error:
                raise UserError(f"{args.cache} cannot be written: {error.strerror or error}") from None
    manifest = repair.manifest
    if args.json:
        values = {"path": args.cache, "changed": repair.changed, "complete": manifest.complete}
        values |= {"images": manifest.rows, "shards": len(manifest.shards), "extract_again": repair.lost}
        output.print_json({**values, "moved_aside": repair.aside}, out)
        return 0 if manifest.complete else 1
    for file, why in repair.lost.items():
        moved = f"; {'would move' if args.dry_run else 'moved'} to {DAMAGED}/" if file in repair.aside else ""
        output.print_line(f"{SHARDS}/{file}: extract it again: {why}{moved}", out)
    done = "nothing to do" if not repair.changed else f"{'would make' if args.dry_run else 'made'} {MANIFEST} anew"
    counted = f"{manifest.rows:,} images in {len(manifest.shards):,} whole shards"
    output.print_line(f"{args.cache}: {done}: {counted}, {len(repair.lost):,} to extract again", out)
    if not manifest.complete:
        output.print_line("run the extraction command again: it adds what is missing, if anything is", out)
    return 0 if manifest.complete else 1


def without_features(rows: Rows, keys: list[str]) -> Iterator[Problem]:
    """Find images of the records that have no features; quarantined ones are notes."""
    left_out = read_quarantine(rows.cache.path)
    for key, row in zip(keys, rows.cache.find(keys).tolist(), strict=True):
        if row < 0 and key in left_out:
            yield Problem(key, f"quarantined: {left_out[key].reason}", "mend the image and extract again", note=True)
        elif row < 0:
            yield Problem(key, "it has no features", "run the extraction command with these records")


def changed_sources(rows: Rows, image_folder: str) -> Iterator[Problem]:
    """Find images that are missing, or are no longer the files that the features were made from."""
    from llava_twophase.vision.images import BadImage, ImageFolder, open_images

    images = open_images(image_folder)
    sizes, digests = rows.cache.column("source_size"), rows.cache.column("source_sha256")
    starts = np.cumsum([0, *(header.rows for header in rows.cache.headers)])

    def look(row: int) -> str | None:
        try:
            data = images.read(rows.keys([row])[0])
        except BadImage as error:
            return f"it {error}" if str(error).startswith("cannot") else str(error)
        if len(data) != int(sizes[row]):
            return f"it was edited or replaced since: {len(data):,} bytes, {int(sizes[row]):,} when it was encoded"
        if hashlib.sha256(data).digest() != digests[row].tobytes():
            return f"it was edited or replaced since: the same {len(data):,} bytes, but another SHA-256"
        return None

    # Hashing and reading leave the interpreter's lock; archives are read by one thread.
    with (
        ThreadPoolExecutor(_THREADS if isinstance(images, ImageFolder) else 1) as pool,
        tqdm(total=len(rows.cache), unit="image", desc="sources", disable=None) as bar,
    ):
        for first in range(0, len(rows.cache), _CHUNK):
            part = range(first, min(first + _CHUNK, len(rows.cache)))
            for row, what in zip(part, pool.map(look, part), strict=True):
                if what is not None:
                    shard = rows.cache.manifest.shards[int(np.searchsorted(starts, row, side="right")) - 1].file
                    fix = f"restore it, or delete {SHARDS}/{shard} and run the same extraction command again"
                    yield Problem(rows.keys([row])[0], what, fix)
            bar.update(len(part))


def _print(path: str, problems: Iterable[Problem], out: Console) -> None:
    # A line each, the notes last.
    found = sorted(problems, key=lambda problem: problem.note)
    for problem in found[:_SHOWN_PROBLEMS]:
        prefix, style = ("note: ", "") if problem.note else ("", "red")
        output.print_line(f"{prefix}{problem.file}: {problem.what}; {problem.fix}", out, style)
    if len(found) > _SHOWN_PROBLEMS:
        output.print_line(f"... and {len(found) - _SHOWN_PROBLEMS:,} more; --json lists all", out)
    wrong = sum(not problem.note for problem in found)
    if wrong:
        output.print_line(f"{path}: {wrong:,} problem{'s' if wrong > 1 else ''} found", out)
