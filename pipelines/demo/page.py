"""The demo's result as one HTML page: figures, the loss curve, the commands, and captions of held-out pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_twophase import __version__
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.files import replace_file
from llava_twophase.html import Card, Page, mark_differences
from llava_twophase.inspection import pictures
from llava_twophase.plots import INLINE, inline_svg, loss_figure, missing_matplotlib
from pipelines.demo.evaluation import Evaluation

THUMBNAIL = 224  # pixels
_RECORD = {
    "id": "1",
    "image": "cats/first.jpg",
    "conversations": [
        {"from": "human", "value": "Describe the image.\n<image>"},
        {"from": "gpt", "value": "a cat asleep on a red sofa"},
    ],
}


@dataclass(frozen=True)
class Shown:
    """What the page shows.

    Attributes:
        title: Heading.
        notes: Paragraphs: what was run, and on which data.
        commands: The commands that were run, one string each.
        own: Commands for a user's own pictures.
        result: Figures and captions of the held-out records.
    """

    title: str
    notes: Sequence[str]
    commands: Sequence[str]
    own: Sequence[str]
    result: Evaluation


def write_page(folder: Path, shown: Shown) -> Path:
    """Write the page.

    Args:
        folder: The demo's folder, with ``images``, ``cache`` and ``projector``.
        shown: What it shows.

    Returns:
        The HTML file.
    """
    result = shown.result
    page = Page(shown.title, shown.notes[0], f"llava-twophase {__version__}")
    for note in shown.notes[1:]:
        page.text(note)
    figures = {
        "loss with the right image": f"{result.right_image_loss:.3f}",
        "loss with a wrong image": f"{result.wrong_image_loss:.3f}",
        "generated captions that equal the true one": f"{result.exact_captions:.0%}",
    }
    page.table(figures, f"{len(result.captions)} held-out pictures")
    _add_loss(page, folder / "projector" / "trainer_state.json")
    _add_features(page, folder, result.images[0])
    page.section("Held-out pictures")
    page.text("Captions that the model generated. Words that the true caption does not have are marked.")
    rows = zip(result.images, result.captions, result.generated, strict=True)
    page.cards([_card(folder / "images", *row) for row in rows])
    page.links({"full report: every record, intervals, by caption length": "evaluation.html"})
    page.section("The commands")
    page.code(shown.commands)
    page.section("Now with your own pictures")
    page.text("Write one record for each picture into a JSON file, as a list:")
    page.code([json.dumps([_RECORD])])
    page.text("Then run the same commands on it. Image paths are relative to the image folder.")
    page.code(shown.own)
    path = folder / "index.html"
    with replace_file(path) as file:
        file.write(page.to_bytes())
    return path


def _add_loss(page: Page, state: Path) -> None:
    page.section("Loss")
    reason = missing_matplotlib()
    if reason:
        page.text(f"No curve: {reason}")
        return
    history: list[dict[str, Any]] = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    page.plots({"training loss": inline_svg(loss_figure({"loss": history}, INLINE), "loss")})


def _add_features(page: Page, folder: Path, image: str) -> None:
    cache = FeatureCache(folder / "cache")
    maps = pictures.draw_maps(cache.read([image]), cache.fingerprint)
    with Image.open(folder / "images" / image) as opened:
        crop = pictures.crop(opened.convert("RGB"), cache.fingerprint, THUMBNAIL)
    page.section("A picture and its patch features")
    page.figures(
        {
            "a held-out picture as the tower sees it": crop,
            "its patch features as PCA colours": Image.fromarray(maps.pca[0]),
            "the norms of its patch features": Image.fromarray(maps.norms[0]),
        }
    )
    page.ramp("norms", *maps.norm_range)
    page.text("llava-inspect-cache show draws this for any picture of a cache; report also shows statistics.")


def _card(images: Path, image: str, caption: str, generated: str) -> Card:
    with Image.open(images / image) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    if caption == generated:
        lines: list[str] = [f"✓ {generated}"]
    else:
        lines = [mark_differences(generated, caption), f"true: {caption}"]
    return Card(image, lines, panels=[("the picture", picture)])
