"""Fixtures of the training tests."""

import pytest

from helpers import run


@pytest.fixture(scope="session")
def plain_cache(plain_set, tiny_clip, tmp_path_factory):
    """A cache of the plain scenes from a float32 tower, made by command 1."""
    folder = tmp_path_factory.mktemp("plain_cache") / "cache"
    flags = ["--data_path", plain_set.json, "--image_folder", plain_set.folder, "--vision_tower", tiny_clip]
    run(["python", "pipelines/extract_features.py", *flags, "--feature_cache", folder, "--compute_dtype", "fp32"])
    return folder
