"""The figures and captions that `use_projector.py evaluate --json` measured on the held-out records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Evaluation:
    """Figures and texts of the held-out records.

    Attributes:
        right_image_loss: Mean loss per caption token, each record with its own image.
        wrong_image_loss: The same captions, each with the image of another record whose caption differs.
        exact_captions: Part of the generated captions that equal the true one, 0 to 1.
        images: Image keys.
        captions: True captions.
        generated: Generated captions.
    """

    right_image_loss: float
    wrong_image_loss: float
    exact_captions: float
    images: list[str]
    captions: list[str]
    generated: list[str]


def read_evaluation(path: Path) -> Evaluation:
    """Read the report of one run."""
    report = json.loads(path.read_text(encoding="utf-8"))
    (figures,), (records,) = report["runs"].values(), report["records"].values()
    return Evaluation(
        right_image_loss=figures["loss"]["value"],
        wrong_image_loss=figures["loss_shuffled"]["value"],
        exact_captions=figures["exact"]["value"],
        images=[record["image"] for record in records],
        captions=[record["caption"] for record in records],
        generated=[record["generated"] for record in records],
    )
