"""Fixtures of the training tests."""

import pytest

from commands import extract_command
from helpers import run


@pytest.fixture(scope="session")
def plain_cache(plain_set, tiny_clip, tmp_path_factory):
    """A cache of the plain scenes from a float32 tower, made by command 1."""
    folder = tmp_path_factory.mktemp("plain_cache") / "cache"
    images = {"data_path": plain_set.json, "image_folder": plain_set.folder}
    run(["python", *extract_command(**images, vision_tower=tiny_clip, feature_cache=folder)])
    return folder
