"""``verify`` and ``repair``: compare a cache with its checksums, its records and its images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from tqdm import tqdm

from llava_twophase.cache.check.files import Problem
from llava_twophase.cache.check.repair import DAMAGED, Repair, apply_repair, plan_repair
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.format import MANIFEST, SHARDS
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.cache.quarantine import read_quarantine
from llava_twophase.cache.session import CacheSession
from llava_twophase.cache.storage import is_url
from llava_twophase.errors import UserError
from llava_twophase.inspection import output
from llava_twophase.inspection.rows import CheckedRows
from llava_twophase.records import image_keys, load_records
from llava_twophase.text import agree, counted

if TYPE_CHECKING:
    from llava_twophase.vision.sources import ImageSource

_SHOWN_PROBLEMS = 100
_CHUNK = 256
_THREADS = 8


def run_verify(path: str, records: str | None, sources: str | None, as_json: bool) -> int:
    """Check every bit, and records and images if given; return 1 if something is wrong."""
    # Opened first: a wrong path should be reported before hours of reading.
    keys = image_keys(load_records(records, "--records", sources)) if records else None
    if sources:
        _require_images(sources)
    problems = verify(path)
    checked = ["every bit as it was written"]
    # Without a manifest there are no rows to compare.
    if (keys or sources) and all(problem.note or problem.file != MANIFEST for problem in problems):
        try:
            rows = CheckedRows(path)
            if keys:
                problems += without_features(rows, keys)
                checked.append(f"{counted(len(keys), 'image')} of {records} {agree(len(keys), 'has', 'have')} features")
            if sources:
                problems += changed_sources(rows, rows.open_images(sources))
                checked.append(_checked_sources(rows, sources))
        except UserError as error:
            if not problems:
                raise
            problems.append(Problem(path, f"records and sources were not checked: {error}", "fix it first"))
    ok = all(problem.note for problem in problems)
    values = {"path": path, "ok": ok, "problems": [asdict(problem) for problem in problems]}
    output.print_result(values, as_json, lambda out: _print_verify(path, problems, checked, out))
    return 0 if ok else 1


def run_repair(path: str, records: str | None, image_folder: str | None, dry_run: bool, as_json: bool) -> int:
    """Rebuild the manifest; return 1 if images must be extracted again."""
    keys = image_keys(load_records(records, "--records", image_folder)) if records else None
    if is_url(path):
        raise UserError(f"repair changes files, and {path} is a URL; pull the cache, repair it, and push it again")
    if not Path(path).is_dir():
        raise UserError(f"{path} is not a folder; expected a feature cache, with {MANIFEST} and {SHARDS}/")
    if dry_run or not (Path(path) / SHARDS).is_dir():
        repair = plan_repair(path, keys)
    else:
        with CacheSession(Path(path), read=False) as session:
            repair = plan_repair(path, keys)
            if repair.changed:
                try:
                    apply_repair(session, repair)
                except OSError as error:
                    raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    manifest = repair.manifest
    values: dict[str, Any] = {"path": path, "changed": repair.changed, "complete": manifest.complete}
    values |= {"images": manifest.rows, "shards": len(manifest.shards), "extract_again": repair.lost}
    values["moved_aside"] = repair.aside
    output.print_result(values, as_json, lambda out: _print_repair(path, repair, dry_run, out))
    return 0 if manifest.complete else 1


def without_features(rows: CheckedRows, keys: list[str]) -> Iterator[Problem]:
    """Find images of the records that have no features; quarantined ones are notes."""
    excluded = read_quarantine(rows.cache.path)
    for key, row in zip(keys, rows.cache.find(keys).tolist(), strict=True):
        if row < 0 and key in excluded:
            yield Problem(key, f"quarantined: {excluded[key].reason}", "fix the image and extract again", note=True)
        elif row < 0:
            yield Problem(key, "it has no features", "run the extraction command with these records")


def changed_sources(rows: CheckedRows, images: ImageSource) -> Iterator[Problem]:
    """Find images that are missing, or are not the files that the features were made from."""
    from llava_twophase.vision.images import BadImage
    from llava_twophase.vision.sources import ImageFolder

    starts = np.cumsum([0, *(header.rows for header in rows.cache.headers)])

    def check(row: int) -> str | None:
        source = rows.source(row)
        if source is None:
            return None
        try:
            data = images.read(rows.keys([row])[0])
        except BadImage as error:
            return f"it {error}" if str(error).startswith("cannot") else str(error)
        if len(data) != source[0]:
            return f"it was edited or replaced since: {len(data):,} bytes, {source[0]:,} when it was encoded"
        if hashlib.sha256(data).digest() != source[1]:
            return f"it was edited or replaced since: the same {len(data):,} bytes, but another SHA-256"
        return None

    # Reading and hashing release the interpreter's lock; archives are read by one thread.
    with (
        ThreadPoolExecutor(_THREADS if isinstance(images, ImageFolder) else 1) as pool,
        tqdm(total=len(rows.cache), unit="image", desc="sources", disable=None) as bar,
    ):
        for first in range(0, len(rows.cache), _CHUNK):
            part = range(first, min(first + _CHUNK, len(rows.cache)))
            for row, what in zip(part, pool.map(check, part), strict=True):
                if what is not None:
                    shard = rows.cache.manifest.shards[int(np.searchsorted(starts, row, side="right")) - 1].file
                    fix = f"restore it, or delete {SHARDS}/{shard} and run the same extraction command again"
                    yield Problem(rows.keys([row])[0], what, fix)
            bar.update(len(part))


def _require_images(sources: str) -> None:
    from llava_twophase.vision.sources import open_images

    open_images(sources)


def _checked_sources(rows: CheckedRows, sources: str) -> str:
    count = rows.recorded_sources()
    if count == len(rows.cache):
        return f"all files in {sources} unchanged"
    files = counted(len(rows.cache), "file")
    return f"{count:,} of {files} in {sources} unchanged, the others {output.NOT_RECORDED} in the cache"


def _print_verify(path: str, problems: Iterable[Problem], checked: list[str], out: Console) -> None:
    # One line for each problem, then the notes.
    found = sorted(problems, key=lambda problem: problem.note)
    for problem in found[:_SHOWN_PROBLEMS]:
        prefix, style = ("note: ", "") if problem.note else ("", "red")
        output.print_line(f"{prefix}{problem.file}: {problem.what}; {problem.fix}", out, style)
    if len(found) > _SHOWN_PROBLEMS:
        output.print_line(f"... and {len(found) - _SHOWN_PROBLEMS:,} more; --json lists all", out)
    wrong = sum(not problem.note for problem in found)
    if wrong:
        output.print_line(f"{path}: {counted(wrong, 'problem')} found", out)
    else:
        manifest = read_manifest(path)
        size = f"{counted(manifest.rows, 'image')} in {counted(len(manifest.shards), 'shard')}"
        output.print_line(f"{path}: {size}, {', '.join(checked)}", out, "green")


def _print_repair(path: str, repair: Repair, dry_run: bool, out: Console) -> None:
    manifest = repair.manifest
    for file, why in repair.lost.items():
        moved = f"; {'would move' if dry_run else 'moved'} to {DAMAGED}/" if file in repair.aside else ""
        output.print_line(f"{SHARDS}/{file}: extract it again: {why}{moved}", out)
    done = "nothing to do" if not repair.changed else f"{'would rebuild' if dry_run else 'rebuilt'} {MANIFEST}"
    size = f"{counted(manifest.rows, 'image')} in {counted(len(manifest.shards), 'intact shard')}"
    output.print_line(f"{path}: {done}: {size}, {len(repair.lost):,} to extract again", out)
    if not manifest.complete:
        output.print_line("run the extraction command again: it adds what is missing, if anything is", out)
