"""``report``: summary, coverage, statistics and a sample of images as one HTML page."""

from __future__ import annotations

import sys
from collections import defaultdict

import numpy as np
from PIL import Image

from llava_twophase import __version__
from llava_twophase.errors import UserError
from llava_twophase.html import Card, Page
from llava_twophase.inspection import output, pictures, plots
from llava_twophase.inspection.coverage import coverage, headline
from llava_twophase.inspection.coverage import in_words as coverage_in_words
from llava_twophase.inspection.rows import CheckedRows
from llava_twophase.inspection.show import seen
from llava_twophase.inspection.statistics import SampleStatistics
from llava_twophase.inspection.statistics import in_words as statistics_in_words
from llava_twophase.inspection.summary import INCOMPLETE, summarize
from llava_twophase.inspection.summary import in_words as summary_in_words
from llava_twophase.plots import missing_matplotlib
from llava_twophase.records import Records, load_records, records_of
from llava_twophase.text import counted, format_bytes
from llava_twophase.vision.images import BadImage
from llava_twophase.vision.sources import ImageSource

_MEASURED = 256
_THUMBNAIL = 224


def run(path: str, html: str, count: int, seed: int, *, images: str | None, records: str | None) -> int:
    """Write the page.

    Args:
        path: The cache's directory.
        html: File to write.
        count: Images of the sample.
        seed: Seed of the sample.
        images: Folder or archive of the images, for thumbnails.
        records: Data file, for captions and coverage.
    """
    output.check_output(html)
    loaded = load_records(records, image_folder=images) if records else records_of([])
    values, rows = summarize(path), CheckedRows(path)
    opened = rows.open_images(images) if images else None
    page = Page(f"Feature cache {path}", values["made_by"], f"llava-twophase {__version__}")
    if not values["complete"]:
        page.warn(INCOMPLETE)
    page.section("Summary")
    page.table(summary_in_words(values))
    if records:
        _add_coverage(page, rows, loaded, records)
    _add_statistics(page, rows, seed)
    _add_sample(page, rows, loaded, opened, rows.sample(count, seed))
    page.section("What made it")
    page.details("fingerprint: changes a value, so it is compared", output.flatten(values["fingerprint"]))
    page.details("provenance: only recorded", output.flatten(values["provenance"]))
    content = page.to_bytes()
    output.write_file(html, lambda file: file.write(content))
    output.print_written(html, f"{format_bytes(len(content))}, one file")
    return 0


def _add_coverage(page: Page, rows: CheckedRows, records: Records, data_path: str) -> None:
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


def _add_statistics(page: Page, rows: CheckedRows, seed: int) -> None:
    measured = SampleStatistics(rows, _MEASURED, seed)
    page.section("Statistics")
    reason = missing_matplotlib()
    if reason is None:
        page.plots(plots.inline(measured))
    else:
        print(f"warning: the report has no plots: {reason}", file=sys.stderr)
        page.warn(f"No plots: {reason}")
    for title, found in statistics_in_words(measured.values()).items():
        page.table(found, title)


def _add_sample(
    page: Page, rows: CheckedRows, records: Records, images: ImageSource | None, picked: np.ndarray
) -> None:
    features = rows.values(picked)
    finite = np.isfinite(features).all((1, 2))
    picked, features = picked[finite], features[finite]
    page.section(f"A sample of {counted(len(picked), 'image')}")
    maps, legend = None, "All images share one PCA basis: a colour means the same in each of them."
    try:
        if len(picked):
            maps = pictures.draw_maps(features, rows.cache.fingerprint)
    except UserError as error:
        legend = str(error)
    captions = defaultdict(list)
    for record in records:
        captions[record.image].append(record.caption)
    norms = np.linalg.norm(features.astype(np.float64), axis=-1).mean(1)
    cards = []
    for place, (row, key) in enumerate(zip(picked.tolist(), rows.keys(picked), strict=True)):
        panels, problem = _thumbnail(rows, images, row)
        if maps is not None:
            panels.append(("patch features as PCA colours", Image.fromarray(maps.pca[place])))
            panels.append(("token norms", Image.fromarray(maps.norms[place])))
        note = f"mean token norm {norms[place]:.4g}{'; ' if problem else ''}{problem}"
        cards.append(Card(key, captions[key], note, panels))
    page.text(legend)
    if maps:
        page.ramp("token norms", *maps.norm_range)
    page.cards(cards)


def _thumbnail(rows: CheckedRows, images: ImageSource | None, row: int) -> tuple[list[tuple[str, Image.Image]], str]:
    if images is None:
        return [], ""
    try:
        crop, warning = seen(rows, images, row, _THUMBNAIL)
    except BadImage as error:
        return [], f"the image: {error}"
    return [("the image as the tower saw it", crop)], warning
