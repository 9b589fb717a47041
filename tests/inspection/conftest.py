"""A cache made by the extraction itself, for all that needs images, records or the tower."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from commands import extract_command
from helpers import run


@dataclass(frozen=True)
class Made:
    """A cache and what it was made of."""

    cache: Path
    images: Path
    records: Path
    tower: Path
    keys: list


def extract(image_set, tower, cache, *flags):
    """Run command 1 with the tiny tower."""
    images = {"data_path": image_set.json, "image_folder": image_set.folder}
    command = extract_command(**images, vision_tower=tower, feature_cache=cache, compute_dtype=None, images_per_shard=5)
    run(["python", *command, *flags])
    return cache


@pytest.fixture(scope="session")
def original(plain_set, tiny_clip, tmp_path_factory):
    """Twelve plain images in three shards; read-only."""
    cache = extract(plain_set, tiny_clip, tmp_path_factory.mktemp("inspect") / "cache")
    return Made(cache, plain_set.folder, plain_set.json, tiny_clip, plain_set.keys)


@pytest.fixture
def made(original, tmp_path):
    """The same, to be changed."""
    cache, images = tmp_path / "cache", tmp_path / "images"
    shutil.copytree(original.cache, cache)
    shutil.copytree(original.images, images)
    return Made(cache, images, original.records, original.tower, original.keys)
