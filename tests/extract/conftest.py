"""The extraction command on tiny inputs, quick to start."""

import pytest

from commands import extract_command
from extract.server import Server, files


@pytest.fixture(scope="session")
def server():
    """Starts the command in forks of one process: see `extract.server.Server`."""
    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def defaults(image_set, tiny_clip):
    """Flags for the complete image set: 29 images, four shards of eight, batches of three."""
    return {
        "data_path": image_set.json,
        "image_folder": image_set.folder,
        "vision_tower": tiny_clip,
        "batch_size": 3,
    }


@pytest.fixture
def command(defaults, tmp_path):
    """Makes the command's arguments; a keyword changes a flag."""
    return lambda **changes: extract_command(**{**defaults, "feature_cache": tmp_path / "cache", **changes})[1:]


@pytest.fixture(scope="session")
def expected_files(server, defaults, tmp_path_factory):
    """The files of a cache that one uninterrupted run made from the image set."""
    cache = tmp_path_factory.mktemp("uninterrupted") / "cache"
    server.run(extract_command(**defaults, feature_cache=cache)[1:])
    return files(cache)
