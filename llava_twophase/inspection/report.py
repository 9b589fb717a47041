"""``report``: all of it as one HTML page that needs nothing beside it; the page itself is written in ``page.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from llava_twophase import __version__
from llava_twophase.errors import UserError
from llava_twophase.html import Card, Page
from llava_twophase.inspection import output, pictures, plots
from llava_twophase.inspection.coverage import coverage, headline
from llava_twophase.inspection.coverage import in_words as coverage_in_words
from llava_twophase.inspection.rows import Rows
from llava_twophase.inspection.show import seen
from llava_twophase.inspection.statistics import Measured
from llava_twophase.inspection.statistics import in_words as statistics_in_words
from llava_twophase.inspection.summary import INCOMPLETE, summary
from llava_twophase.inspection.summary import in_words as summary_in_words
from llava_twophase.plots import missing_matplotlib
from llava_twophase.records import Record, load_records
from llava_twophase.text import format_bytes
from llava_twophase.vision.images import BadImage, open_images

_MEASURED = 256
_THUMBNAIL = 224


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    records = load_records(args.data_path) if args.data_path else None
    values, rows = summary(args.cache), Rows(args.cache)
    page = Page(f"Feature cache {args.cache}", values["made_by"], f"llava-twophase {__version__}")
    if not values["complete"]:
        page.warn(INCOMPLETE)
    page.section("Summary")
    page.table(summary_in_words(values))
    _cover(page, rows, records, args.data_path)
    _measure(page, rows, args.seed)
    _sample(page, rows, records, args)
    page.section("What made it")
    page.details("fingerprint: changes a value, so it is compared", output.flat(values["fingerprint"]))
    page.details("provenance: only recorded", output.flat(values["provenance"]))
    text = page.to_bytes()
    output.write_file(args.output, lambda file: file.write(text))
    output.print_line(f"wrote {args.output}: {format_bytes(len(text))}, one file", output.console())
    return 0


def _cover(page: Page, rows: Rows, records: Sequence[Record] | None, data_path: str) -> None:
    if records is None:
        return
    covered = coverage(rows, records)
    covered["truncated"] = None
    page.section("Coverage")
    line = headline(covered, data_path)
    if covered["images_without_features"]:
        page.warn(line)
    else:
        page.text(line)
    page.table({name: text for name, text in coverage_in_words(covered).items() if "truncated" not in name})
    if missing_matplotlib() is None:
        page.plots({"words of a caption": plots.inline_words(covered["caption_words"])})


def _measure(page: Page, rows: Rows, seed: int) -> None:
    measured = Measured(rows, _MEASURED, seed)
    page.section("Statistics")
    reason = missing_matplotlib()
    if reason is None:
        page.plots(plots.inline(measured))
    else:
        print(f"warning: the report has no plots: {reason}", file=sys.stderr)
        page.warn(f"No plots: {reason}")
    for title, found in statistics_in_words(measured.values()).items():
        page.table(found, title)


def _sample(page: Page, rows: Rows, records: Sequence[Record] | None, args: argparse.Namespace) -> None:
    picked = rows.sample(args.n, args.seed)
    features = rows.values(picked)
    finite = np.isfinite(features).all((1, 2))
    picked, features = picked[finite], features[finite]
    page.section(f"A sample: {len(picked):,} images, seed {args.seed}")
    maps, reason = None, ""
    try:
        if len(picked):
            maps = pictures.draw_maps(features, rows.cache.fingerprint)
    except UserError as error:
        reason = str(error)
    captions: dict[str, list[str]] = {}
    for record in records or []:
        captions.setdefault(record.image, []).append(record.caption)
    images = open_images(args.image_folder) if args.image_folder else None
    keys = rows.keys(picked)
    norms = np.linalg.norm(features, axis=-1).mean(1) if len(picked) else []
    cards = []
    for place, (row, key) in enumerate(zip(picked.tolist(), keys, strict=True)):
        panels: list[tuple[str, Image.Image]] = []
        note = f"mean token norm {norms[place]:.4g}"
        if images is not None:
            try:
                crop, same = seen(rows, images, row, _THUMBNAIL)
                panels.append(("the picture as the tower saw it", crop))
                note += "" if same else "; the file changed since"
            except BadImage as error:
                note += f"; the picture {error}"
        if maps is not None:
            panels.append(("patch features as PCA colours", Image.fromarray(maps.pca[place])))
            panels.append(("token norms", Image.fromarray(maps.norms[place])))
        cards.append(Card(key, captions.get(key, []), note, panels))
    page.text(reason or "All images share one PCA basis: a colour means the same in each of them.")
    if maps:
        page.ramp("token norms", *maps.norm_range)
    page.cards(cards)
