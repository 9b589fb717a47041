"""The extraction command on tiny inputs, quick to start."""

import pytest

from extract.server import Server, files


@pytest.fixture(scope="session")
def server():
    """Starts the command in forks of one process: see `extract.server.Server`."""
    with Server() as running:
        yield running


@pytest.fixture
def command(image_set, tiny_clip, tmp_path):
    """The command's arguments for the whole image set: 29 images, four shards of eight, batches of three."""

    def make(**changes):
        flags = {
            "data_path": image_set.json,
            "image_folder": image_set.folder,
            "vision_tower": tiny_clip,
            "feature_cache": tmp_path / "cache",
            "compute_dtype": "fp32",
            "images_per_shard": 8,
            "batch_size": 3,
            "num_workers": 0,
            "device": "cpu",
            **changes,
        }
        return [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]

    return make


@pytest.fixture(scope="session")
def whole(server, image_set, tiny_clip, tmp_path_factory):
    """The files of a cache that one uninterrupted run made of the image set."""
    cache = tmp_path_factory.mktemp("whole") / "cache"
    flags = f"--data_path {image_set.json} --image_folder {image_set.folder} --vision_tower {tiny_clip} "
    flags += "--compute_dtype fp32 --images_per_shard 8 --batch_size 3 --num_workers 0 --device cpu"
    server.run([*flags.split(), "--feature_cache", cache])
    return files(cache)
