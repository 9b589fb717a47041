"""``caption``: caption images from the command line, as text, JSON or an HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_twophase import __version__
from llava_twophase.cache.joined import open_caches
from llava_twophase.deploy.captioner import Captioner, Placement
from llava_twophase.deploy.inputs import NamedImage, is_records, list_images, thumbnail
from llava_twophase.deploy.trained_projector import TrainedProjector
from llava_twophase.errors import UserError, combined_error
from llava_twophase.files import replace_file
from llava_twophase.html import Card, Page
from llava_twophase.text import counted


@dataclass(frozen=True)
class CaptionOptions:
    """Flags of ``caption``.

    Attributes:
        image_folder: Folder or archive of the records' images.
        feature_cache: Cache whose images need no vision tower, or the cache of each joined tower.
        batch_size: Images of one batch.
        html: Page to write, or None.
        json: Print one JSON object per image.
    """

    image_folder: str | None
    feature_cache: Sequence[str] | None
    batch_size: int
    html: str | None
    json: bool


def caption(projector: TrainedProjector, images: Sequence[str], placement: Placement, options: CaptionOptions) -> int:
    """Print a caption for each image.

    Returns:
        0, or 1 where some images could not be used.

    Raises:
        UserError: An image does not exist or a model cannot be loaded; nothing was captioned.
    """
    named = list_images(images, options.image_folder)
    needs_folder = options.image_folder is None and any(map(is_records, images))
    advice = "; images of records need --image_folder" if needs_folder else ""
    _require_existing(named, options.feature_cache, projector.interpolate_patch_grid, advice)
    captioner = Captioner.load(projector, placement, feature_cache=options.feature_cache)
    cards, failed = [], 0
    for image, text, error in _captions(captioner, named, options.batch_size):
        failed += error is not None
        if options.json:
            line = {"image": image.name, **({"error": error} if error else {"caption": text})}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            print(f"{image.name}\t{f'error: {error}' if error else text}", flush=True)
        if options.html is not None:
            cards.append(Card(title=image.name, lines=[text or f"error: {error}"], panels=thumbnail(image.read)))
    if options.html is not None:
        page = Page("Captions", f"{counted(len(named), 'image')} by {projector.path}", f"llava-twophase {__version__}")
        page.cards(cards)
        with replace_file(Path(options.html)) as file:
            file.write(page.to_bytes())
    return 1 if failed else 0


def _require_existing(
    images: Sequence[NamedImage], caches: Sequence[str] | None, interpolate: bool, advice: str
) -> None:
    missing = [image.name for image in images if not image.exists]
    if caches:
        missing = open_caches(caches, interpolate).missing(missing)
    if missing:
        where = f", neither as a file nor in {' and '.join(caches)}" if caches else ""
        raise combined_error(missing, f"{len(missing)} of {counted(len(images), 'image')} not found{where}{advice}")


def _captions(
    captioner: Captioner, images: Sequence[NamedImage], batch_size: int
) -> Iterator[tuple[NamedImage, str, str | None]]:
    """Yield image, caption and error in order; an image that cannot be used has an error instead of a caption."""
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        prepared, errors = [], {}
        for place, image in enumerate(part):
            try:
                is_cached = captioner.images.has(image.name)
                prepared.append(captioner.images.prepare(image.name if is_cached else image.read()))
            except UserError as error:
                errors[place] = str(error)
        texts = iter(captioner.caption_features(captioner.images.encode(prepared)) if prepared else [])
        for place, image in enumerate(part):
            yield (image, "", errors[place]) if place in errors else (image, next(texts), None)
