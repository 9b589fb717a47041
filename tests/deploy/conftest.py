"""A short training run, its cache and its models, for all tests that use a trained projector."""

from dataclasses import dataclass
from pathlib import Path

import pytest

import helpers
from commands import extract_command, train_command


@dataclass(frozen=True)
class Trained:
    """A training run of six steps that captioned its evaluation records, and what it was made of."""

    run: Path
    cache: Path
    images: Path
    records: Path
    keys: list
    tower: Path
    llm: Path


@pytest.fixture(scope="session")
def trained(plain_set, tiny_clip, tiny_llama, tmp_path_factory):
    """A run in float32 with an eager tower; read-only."""
    folder = tmp_path_factory.mktemp("trained")
    images = {"data_path": plain_set.json, "vision_tower": tiny_clip, "feature_cache": folder / "cache"}
    helpers.run(["python", *extract_command(**images, image_folder=plain_set.folder)])
    command = train_command(
        **images,
        model_name_or_path=tiny_llama,
        output_dir=folder / "run",
        eval_data_path=plain_set.json,
        evaluation_strategy="epoch",
        num_train_epochs=1,
        sample_captions=4,
    )
    helpers.run(["python", *command])
    return Trained(
        run=folder / "run",
        cache=folder / "cache",
        images=plain_set.folder,
        records=plain_set.json,
        keys=plain_set.keys,
        tower=tiny_clip,
        llm=tiny_llama,
    )
