"""Data of time_to_loss.py: drawn scenes with richer captions than the demo's, and Debian's stamps, as patch features.

A scene has two groups of one to three equal shapes, in two halves of a picture with a tinted background: about 10 nats
that the picture tells. Its caption says them with one of many wordings, about 9 nats that nothing tells, as captions by
many people do: "a sketch of two red discs to the left of a blue star on pink paper". Without them, runs that differ in
the seed alone end further apart, relative to their loss. Stamps are real drawings and photos with short captions.

Shapes: N images, L = 36 patch tokens, D = 384 tower width.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoTokenizer

from llava_twophase.train.data.conversation import PlainTemplate
from llava_twophase.train.data.tokenizer import load_caption_tokenizer
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower
from pipelines.demo.fetch import DINOV2_SMALL, fetch
from pipelines.demo.scenes import COLOURS, RELATIONS, SHAPES, SIDE, SUPERSAMPLE, draw_shape, jitter
from pipelines.demo.stamps import fetch_stamps, write_stamps
from pipelines.demo.weights import dinov2_folder

CROP = 84  # pixels: 6 x 6 patches
HELD_OUT = {"scenes": 64, "stamps": 96}
TRAIN = {"scenes": 2400, "stamps": None}  # None: all that are not held out
SELECT_LAYER = -3  # keeps more of colours than the second to last
BACKGROUNDS = {"white": (246, 246, 246), "pink": (250, 205, 215), "cyan": (190, 240, 240), "gray": (165, 165, 165)}
COUNTS = {1: ("a",), 2: ("two", "2", "a pair of"), 3: ("three", "3", "a trio of")}
OPENINGS = (
    "",
    "a drawing of ",
    "a picture of ",
    "an image of ",
    "a sketch of ",
    "this shows ",
    "shown here: ",
    "we see ",
)
NAMES = {
    "circle": ("circle", "disc", "dot", "ball"),
    "square": ("square", "block", "tile"),
    "triangle": ("triangle", "wedge"),
    "star": ("star",),
}
PLACES = {
    "left of": ("left of", "to the left of", "on the left side of", "at the left of"),
    "right of": ("right of", "to the right of", "on the right side of", "at the right of"),
    "above": ("above", "over", "higher than", "on top of"),
    "below": ("below", "under", "beneath", "lower than"),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BEHIND = ("on a {} background", "against a {} background", "on {} paper", "in front of a {} wall", "with {} behind")


@dataclass(frozen=True)
class Split:
    """Features and tokenized captions of one split.

    Attributes:
        features: bfloat16 ``[N, L, D]``.
        input_ids: int64 ``[T]`` of each image, the image token included.
        labels: int64 ``[T]``, -100 where no loss is computed.
    """

    features: torch.Tensor
    input_ids: list[torch.Tensor]
    labels: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.features)

    def samples(self, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        """Return samples as ``collate`` takes them."""
        return [
            {"features": self.features[row], "input_ids": self.input_ids[row], "labels": self.labels[row]}
            for row in rows
        ]


@dataclass(frozen=True)
class Group:
    """Some equal shapes."""

    count: int
    colour: str
    shape: str

    def describe(self, rng: random.Random) -> str:
        """Return one of its wordings."""
        count, name = rng.choice(COUNTS[self.count]), rng.choice(NAMES[self.shape])
        article = "an" if count == "a" and self.colour[0] in "aeiou" else count
        return f"{article} {self.colour} {name}{'s' if self.count > 1 else ''}"


def draw_rich_scene(rng: random.Random) -> tuple[Image.Image, str]:
    """Draw one scene of ``SIDE`` x ``SIDE`` pixels and return it with its caption."""
    groups = [Group(rng.randint(1, 3), colour, rng.choice(SHAPES)) for colour in rng.sample(list(COLOURS), 2)]
    relation, background = rng.choice(list(RELATIONS)), rng.choice(list(BACKGROUNDS))
    picture = Image.new("RGB", (SIDE * SUPERSAMPLE,) * 2, jitter(BACKGROUNDS[background], rng))
    pen = ImageDraw.Draw(picture)
    dx, dy = RELATIONS[relation]
    for group, side in ((groups[0], 1), (groups[1], -1)):
        for number in range(group.count):
            along = SIDE * (number + 0.5) / group.count + rng.uniform(-5, 5)
            across = SIDE / 2 + side * (dx + dy) * (SIDE / 4 + rng.uniform(-5, 5))
            centre = (across, along) if dx else (along, across)
            draw_shape(pen, group.shape, centre, rng.uniform(13, 17), jitter(COLOURS[group.colour], rng))
    if rng.random() < 0.5:
        groups, relation = groups[::-1], OPPOSITE[relation]
    first, second = (group.describe(rng) for group in groups)
    behind = rng.choice(BEHIND).format(background)
    caption = f"{rng.choice(OPENINGS)}{first} {rng.choice(PLACES[relation])} {second} {behind}"
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), caption


def draw_scenes(train: int, held_out: int) -> tuple[list[tuple[Image.Image, str]], list[tuple[Image.Image, str]]]:
    """Draw both splits; every scene is another random one."""
    rng = random.Random(0)
    pairs = [draw_rich_scene(rng) for _ in range(train + held_out)]
    return pairs[:train], pairs[train:]


def read_stamps(folder: Path, held_out: int) -> tuple[list[tuple[Image.Image, str]], list[tuple[Image.Image, str]]]:
    """Write the stamps as the demo does and read both splits."""
    splits = []
    for path in write_stamps(fetch_stamps(), folder, held_out):
        records = json.loads(path.read_text(encoding="utf-8"))
        splits.append(
            [
                (Image.open(folder / "images" / record["image"]), record["conversations"][1]["value"])
                for record in records
            ]
        )
    return splits[0], splits[1]


def load_data(name: str, folder: Path, llm: str, with_bos: bool) -> tuple[Split, Split]:
    """Return the training and the held-out split; features are computed by the first call and kept in `folder`."""
    kept = folder / f"features-{name}.pt"
    if not kept.exists():
        held_out = HELD_OUT[name]
        splits = (
            draw_scenes(TRAIN[name] or 0, held_out) if name == "scenes" else read_stamps(folder / "stamps", held_out)
        )
        tower = dinov2_folder(fetch(DINOV2_SMALL), CROP)
        content = [{"features": encode(tower, pairs), "captions": [text for _, text in pairs]} for pairs in splits]
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(content, kept.with_suffix(".tmp"))
        kept.with_suffix(".tmp").replace(kept)
    template = caption_template(llm, with_bos)
    train, held = (tokenize(part, template) for part in torch.load(kept))
    return train, held


def encode(tower: Path, pairs: list[tuple[Image.Image, str]]) -> torch.Tensor:
    """Return the patch features of pictures, bfloat16 ``[N, L, D]``."""
    preprocessor = Preprocessor(str(tower))
    vision = VisionTower(str(tower), preprocessor, select_layer=SELECT_LAYER, dtype=torch.float32)
    found = []
    for start in range(0, len(pairs), 8):
        crops = [torch.from_numpy(preprocessor.crop(picture)) for picture, _ in pairs[start : start + 8]]
        found.append(vision.encode(torch.stack(crops)).to(torch.bfloat16))
    return torch.cat(found)


def caption_template(llm: str, with_bos: bool) -> PlainTemplate:
    """Return the template ``plain`` with the LLM's tokenizer.

    SmolLM2's tokenizer adds no BOS, so the first patch would take the place of the LLM's attention sink. `with_bos`
    begins rows with its BOS, as LLaVA's rows for Vicuna do.
    """
    hf_tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer = load_caption_tokenizer(llm, hf_tokenizer)
    if with_bos:
        tokenizer = replace(tokenizer, bos=hf_tokenizer.bos_token_id)
    return PlainTemplate(tokenizer, model_max_length=2048, image_tokens=(CROP // 14) ** 2)


def tokenize(part: dict[str, Any], template: PlainTemplate) -> Split:
    """Tokenize the captions of one split."""
    rows = [template(caption) for caption in part["captions"]]
    ids, labels = ([torch.tensor(row[column]) for row in rows] for column in (0, 1))
    return Split(part["features"], ids, labels)
