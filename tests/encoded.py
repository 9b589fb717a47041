"""Feature caches of real towers, written in this process: faster than command 1, with the same rows and fingerprint."""

import torch

from llava_twophase import CacheWriter
from llava_twophase.vision.images import decode
from llava_twophase.vision.preprocess import Preprocessor
from llava_twophase.vision.tower import VisionTower


def encode_images(tower, images, keys):
    """Return the features of some images of an image folder, float32 `[B, L, D]`."""
    crops = [tower.preprocessor.crop(decode((images / key).read_bytes())) for key in keys]
    return tower.encode(torch.stack([torch.from_numpy(crop) for crop in crops]))


def load_tower(folder, **settings):
    """Load a tower in float32 with its own image processor."""
    return VisionTower(str(folder), Preprocessor(str(folder)), **settings)


def write_encoded(path, folder, images, keys, **settings):
    """Write the float32 cache of a tower; return its path."""
    tower = load_tower(folder, **settings)
    features = encode_images(tower, images, keys)
    with CacheWriter(path, tower.feature_shape, "float32", tower.fingerprint(), images_per_shard=8) as cache:
        for key, row in zip(keys, features, strict=True):
            cache.add(key, row)
    return path
