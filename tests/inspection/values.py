"""Caches of given values."""

import numpy as np

from cache.make import fingerprint_of, write
from llava_twophase.cache.format import SHARDS
from llava_twophase.cache.shard_writer import ShardSpec, ShardWriter, sha256


def cache_of(folder, values, digests=None, **fingerprint):
    """A float32 cache of given values [n, L, D]."""
    keys = [f"{row}.jpg" for row in range(len(values))]
    (folder / SHARDS).mkdir(parents=True)
    made = {**fingerprint_of("float32"), **fingerprint}
    spec = ShardSpec(values.shape[1:], "float32", made, {})
    writer = ShardWriter(folder / SHARDS / "shard-000000.h5", keys, spec)
    digests = digests or [sha256(key.encode()) for key in keys]
    writer.append(values.astype("<f4"), [(1, digest) for digest in digests])
    write(folder, [writer.seal()], "float32", fingerprint=made)
    return folder


def random_values(count=20, tokens=9, width=32, seed=0):
    return np.random.default_rng(seed).standard_normal((count, tokens, width)).astype(np.float32)
