"""``evaluate``: measure runs on held-out records and report them as text, JSON or one HTML page."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llava_twophase import __version__
from llava_twophase.cache.joined import caches_of, open_caches
from llava_twophase.deploy.captioner import Captioner, Placement
from llava_twophase.deploy.evaluate import EvaluationSettings, RecordResult, evaluate
from llava_twophase.deploy.inputs import thumbnail
from llava_twophase.deploy.statistics import METRICS, Estimate, by_length, compare, require_chrf, summarize
from llava_twophase.deploy.trained_projector import TrainedProjector
from llava_twophase.errors import UserError, combined_error
from llava_twophase.files import replace_file
from llava_twophase.html import Card, Page, mark_differences
from llava_twophase.json_file import finite
from llava_twophase.records import Record, image_keys, load_records
from llava_twophase.text import counted
from llava_twophase.train.data.tower_check import check_all_settings
from llava_twophase.vision.images import BadImage
from llava_twophase.vision.sources import ImageSource, open_images

LIMITS = (
    "These figures compare projectors on the captions that they were trained to write. They do not predict how good a "
    "model is after LLaVA's stage 2: losses of stage 1 are only weakly related to downstream benchmarks. A gain near "
    "zero means that the LLM ignores the image; beyond that, prefer the run with the larger gain and recall, and "
    "confirm the choice with a stage-2 run."
)
_SHOWN = 12


@dataclass(frozen=True)
class EvaluationOptions:
    """Flags of ``evaluate``.

    Attributes:
        data_path: Held-out records.
        image_folder: Folder or archive of their images, or None.
        feature_cache: Cache of their images, or the cache of each joined tower; or None.
        limit: Largest number of records.
        html: Page to write, or None.
        json: Print one JSON object.
        settings: Batch size, candidates and seed.
    """

    data_path: str
    image_folder: str | None
    feature_cache: Sequence[str] | None
    limit: int
    html: str | None
    json: bool
    settings: EvaluationSettings


def evaluate_runs(runs: Mapping[str, TrainedProjector], placement: Placement, options: EvaluationOptions) -> int:
    """Evaluate runs one after another on the same records, and report them side by side.

    Returns:
        0.

    Raises:
        UserError: The records, a model or an image cannot be used.
    """
    require_chrf()
    if options.image_folder is None and options.feature_cache is None:
        raise UserError("evaluate needs the held-out images: give --image_folder or --feature_cache")
    images = None if options.image_folder is None else open_images(options.image_folder)
    records = _sample(load_records(options.data_path, image_folder=options.image_folder), options)
    _require_different_captions(records, options)
    _require_features(runs, image_keys(records), images, options)
    results = {}
    for name, projector in runs.items():
        captioner = Captioner.load(projector, placement, feature_cache=options.feature_cache)
        results[name] = evaluate(captioner, records, _features(captioner, images), options.settings)
        del captioner  # before the next run loads its own LLM
    report = _report(results, options)
    if options.html is not None:
        with replace_file(Path(options.html)) as file:
            file.write(_page(report, results, options, images).to_bytes())
    if options.json:
        rows = {name: [asdict(row) for row in results[name]] for name in results}
        print(json.dumps(finite({**report, "records": rows}), allow_nan=False))
    else:
        _print(report, options)
    return 0


def _sample(records: Sequence[Record], options: EvaluationOptions) -> list[Record]:
    if len(records) <= options.limit:
        return list(records)
    chosen = random.Random(options.settings.seed).sample(range(len(records)), options.limit)
    return [records[position] for position in sorted(chosen)]


def _require_different_captions(records: Sequence[Record], options: EvaluationOptions) -> None:
    captions = len({record.caption for record in records})
    if captions < 2:
        raise UserError(
            f"--data_path {options.data_path}: {counted(len(records), 'record')} with {counted(captions, 'caption')} "
            "to evaluate; expected at least two different captions: give more records (--eval_fraction of the training "
            "command decides how many are held out), or a higher --limit"
        )


def _require_features(
    runs: Mapping[str, TrainedProjector], keys: Sequence[str], images: ImageSource | None, options: EvaluationOptions
) -> None:
    """Check before a model is loaded that the caches belong to all runs, and that every image is found."""
    caches, refused, missing = options.feature_cache or (), [], list(keys)
    for name, projector in runs.items() if caches else ():
        try:
            cache = open_caches(caches, projector.interpolate_patch_grid)
            check_all_settings(caches_of(cache), projector.tower_settings)
            missing = cache.missing(keys)
        except UserError as error:
            if len(runs) == 1:
                raise
            refused.append(f"{name}: {error}")
    if refused:
        raise combined_error(
            refused,
            "--feature_cache does not have the features of all runs; runs of different towers or settings are compared "
            "with --image_folder alone, by the tower of each",
        )
    if images is not None:
        missing = [f"{key}: {reason}" for key, reason in images.missing(missing).items()]
    if missing:
        where = " and ".join([*caches, *([options.image_folder] if options.image_folder else [])])
        advice = "" if options.image_folder else "; give --image_folder too, or extract them"
        raise combined_error(missing, f"{len(missing)} of {counted(len(keys), 'image')} not found in {where}{advice}")


def _features(captioner: Captioner, images: ImageSource | None) -> Callable[[Sequence[str]], torch.Tensor]:
    def read(keys: Sequence[str]) -> torch.Tensor:
        return captioner.features([_input(captioner, images, key) for key in keys])

    return read


def _input(captioner: Captioner, images: ImageSource | None, key: str) -> str | bytes:
    if captioner.images.has(key):
        return key
    assert images is not None  # every image was found
    try:
        return images.read(key)
    except BadImage as error:
        raise UserError(f"image {key}: {error}") from None


def _report(results: Mapping[str, Sequence[RecordResult]], options: EvaluationOptions) -> dict[str, Any]:
    names, seed = list(results), options.settings.seed
    first = results[names[0]]
    return {
        "data_path": options.data_path,
        "evaluated_records": len(first),
        "candidates": options.settings.candidates,
        "runs": {
            name: {key: asdict(value) for key, value in summarize(rows, seed).items()} for name, rows in results.items()
        },
        "differences": {
            name: {key: asdict(value) for key, value in compare(results[name], first, seed).items()}
            for name in names[1:]
        },
        "by_length": {name: by_length(rows) for name, rows in results.items()},
    }


def _print(report: Mapping[str, Any], options: EvaluationOptions) -> None:
    console = Console()
    print(f"{counted(report['evaluated_records'], 'record')} of {options.data_path}; mean and 95 % interval")
    for name, metrics in report["runs"].items():
        table = Table(title=name, title_justify="left", box=None, show_header=False, pad_edge=False)
        for key, value in metrics.items():
            table.add_row(METRICS[key][0], _interval(value))
        console.print(table)
    for name, metrics in report["differences"].items():
        table = Table(
            title=f"{name} minus {next(iter(report['runs']))}",
            title_justify="left",
            box=None,
            show_header=False,
            pad_edge=False,
        )
        for key, value in metrics.items():
            table.add_row(METRICS[key][0], _interval(value), _verdict(value))
        console.print(table)


def _page(
    report: Mapping[str, Any],
    results: Mapping[str, Sequence[RecordResult]],
    options: EvaluationOptions,
    images: ImageSource | None,
) -> Page:
    records, runs = counted(report["evaluated_records"], "held-out record"), counted(len(results), "run")
    page = Page(
        "Evaluation of trained projectors", f"{records} of {options.data_path}, {runs}", f"llava-twophase {__version__}"
    )
    page.text(LIMITS)
    page.section("Runs")
    page.text("Mean over the records with a 95 % bootstrap interval.")
    page.grid(
        ["metric", *report["runs"]],
        [[text, *(_interval(run[key]) for run in report["runs"].values())] for key, (text, _) in METRICS.items()],
    )
    for name, metrics in report["differences"].items():
        page.section(f"{name} minus {next(iter(results))}")
        page.text("Paired bootstrap over the same records: an interval without zero is a difference beyond chance.")
        page.grid(
            ["metric", "difference", ""],
            [[METRICS[key][0], _interval(value), _verdict(value)] for key, value in metrics.items()],
        )
    for name, rows in results.items():
        _add_lengths(page, name, report["by_length"][name])
        _add_records(page, name, rows, images)
    return page


def _add_lengths(page: Page, name: str, groups: Sequence[Mapping[str, float]]) -> None:
    page.section(f"{name}: by length of the true caption")
    page.grid(
        ["tokens", "records", "loss", "words generated / true"],
        [
            [
                f"{group['tokens_from']} to {group['tokens_to']}",
                str(group["records"]),
                f"{group['loss']:.4g}",
                f"{group['length_ratio']:.2f}",
            ]
            for group in groups
        ],
    )


def _add_records(page: Page, name: str, rows: Sequence[RecordResult], images: ImageSource | None) -> None:
    ordered = sorted(rows, key=lambda row: row.loss)
    page.section(f"{name}: lowest loss")
    page.cards([_card(row, images) for row in ordered[:_SHOWN]])
    page.section(f"{name}: highest loss")
    page.cards([_card(row, images) for row in reversed(ordered[-_SHOWN:])])
    page.section(f"{name}: all records")
    page.grid(
        ["image", "true", "generated", "loss", "rank"],
        [[row.image, row.caption.strip(), row.generated, f"{row.loss:.3f}", str(row.rank + 1)] for row in rows],
    )


def _card(row: RecordResult, images: ImageSource | None) -> Card:
    true = row.caption.strip()
    return Card(
        title=row.image,
        lines=[f"true: {true}", mark_differences(row.generated, true)],
        note=f"loss {row.loss:.3f}, with another image {row.loss_shuffled:.3f}, without {row.loss_without:.3f}; "
        f"rank {row.rank + 1}",
        panels=[] if images is None else thumbnail(lambda: images.read(row.image)),
    )


def _interval(value: Mapping[str, float]) -> str:
    return str(Estimate(**value))


def _verdict(value: Mapping[str, float]) -> str:
    return "" if value["low"] <= 0 <= value["high"] else "differs"
