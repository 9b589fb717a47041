"""Draw scenes with captions ("a red circle left of a blue square"), seeded, as records of LLaVA-Pretrain.

A scene has one right caption: its first shape is the larger one, in the middle, and the relation gives its position
relative to the other. Background, sizes, positions and shades vary and are not in the caption.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from llava_twophase.files import replace_file

SIDE = 112  # pixels; a multiple of DINOv2's patch of 14
SUPERSAMPLE = 4  # drawn larger and reduced, because Pillow's shapes have hard edges
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (247, 220, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 200),
    "purple": (130, 60, 170),
}
SHAPES = ("circle", "square", "triangle", "star")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
PROMPTS = ("Describe the image concisely.", "What is in the picture?", "Give a short caption of the image.")


@dataclass(frozen=True)
class Scene:
    """One scene: the words of its caption, and a seed for everything else."""

    first: tuple[str, str]  # colour, shape of the larger
    relation: str
    second: tuple[str, str]  # colour, shape of the smaller
    seed: int

    @property
    def caption(self) -> str:
        """The right caption."""
        (colour, shape), (other_colour, other_shape) = self.first, self.second
        return (
            f"{_article(colour)} {colour} {shape} {self.relation} {_article(other_colour)} {other_colour} {other_shape}"
        )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def random_scene(rng: random.Random) -> Scene:
    """Return a random scene whose two shapes have different colours."""
    colour, other_colour = rng.sample(list(COLOURS), 2)
    first, second = (colour, rng.choice(SHAPES)), (other_colour, rng.choice(SHAPES))
    return Scene(first, rng.choice(list(RELATIONS)), second, rng.getrandbits(64))


def draw(scene: Scene) -> Image.Image:
    """Return the scene as an RGB picture of `SIDE` x `SIDE` pixels; equal scenes give equal pixels."""
    rng = random.Random(scene.seed)
    shade = rng.randint(205, 250)
    background = tuple(min(255, max(0, shade + rng.randint(-10, 10))) for _ in range(3))
    picture = Image.new("RGB", (SIDE * SUPERSAMPLE,) * 2, background)
    pen = ImageDraw.Draw(picture)
    large, small = rng.uniform(18, 21), rng.uniform(11, 14)  # radii in pixels
    dx, dy = RELATIONS[scene.relation]
    # The first shape is near the middle; the second is next to it, on the opposite side of the relation.
    x, y = (SIDE / 2 + rng.uniform(-2, 2) for _ in range(2))
    apart, aside = large + small + rng.uniform(1, 4), rng.uniform(-12, 12)
    second = (x - dx * apart + dy * aside, y - dy * apart + dx * aside)
    for (colour, shape), radius, centre in ((scene.first, large, (x, y)), (scene.second, small, second)):
        draw_shape(pen, shape, centre, radius, jitter(COLOURS[colour], rng))
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def jitter(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    """Return a colour near `colour`."""
    return tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in colour)


def draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, colour: tuple[int, ...]
) -> None:
    """Draw one filled shape that fits a circle of `radius` pixels around `centre`."""
    x, y, r = (value * SUPERSAMPLE for value in (*centre, radius))
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        return
    corners = {"square": 4, "triangle": 3, "star": 10}[shape]
    turn = math.pi / 4 if shape == "square" else 0.0
    points = []
    for corner in range(corners):
        reach = r * 0.45 if shape == "star" and corner % 2 else r
        angle = 2 * math.pi * corner / corners + turn
        points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
    pen.polygon(points, fill=colour)


def write_scenes(folder: Path, train: int, held_out: int, seed: int = 0) -> tuple[Path, Path]:
    """Draw both splits into `folder` and return their record files.

    Args:
        folder: Receives images/*.png, train.json and held_out.json.
        train: Number of training scenes.
        held_out: Number of held-out scenes, of the same distribution; no picture is in both.
        seed: Seed of all scenes.

    Returns:
        Paths of train.json and held_out.json, whose image keys are relative to `folder`/images.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    records: list[dict[str, Any]] = []
    while len(records) < train + held_out:
        scene = random_scene(rng)
        picture = draw(scene)
        if picture.tobytes() in seen:
            continue
        seen.add(picture.tobytes())
        key = f"{len(records):06d}.png"
        picture.save(folder / "images" / key)
        records.append(make_record(key, scene.caption, rng.choice(PROMPTS)))
    return write_splits(folder, records[:train], records[train:])


def make_record(key: str, caption: str, prompt: str) -> dict[str, Any]:
    """Return one record of LLaVA-Pretrain's JSON."""
    human = {"from": "human", "value": f"{prompt}\n<image>"}
    return {"id": key.removesuffix(".png"), "image": key, "conversations": [human, {"from": "gpt", "value": caption}]}


def write_splits(folder: Path, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> tuple[Path, Path]:
    """Write the two record files and return their paths."""
    paths = (folder / "train.json", folder / "held_out.json")
    for path, records in zip(paths, (train, held_out), strict=True):
        with replace_file(path, "w") as file:
            file.write(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    return paths
