"""Compare the read speed of joined caches with that of the caches one by one, on the same data.

    python tests/benchmarks/cache_join.py --folder /some/disk/with/5GB

Each method reads the same random images. The limit is reading them from the first cache, then from the second, each
into a batch of its own: the sum of both times. The order is random in each repetition, and the joined time is compared
with the limit of that repetition; results are medians. *Rows* reads stored rows into memory that is reused. *Delivered*
goes through the data loader of training, which joins the features, and into a fixed batch, as a copy to a GPU would.
The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from cache_read import WARM_UP, evict, positions
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from llava_twophase import CacheWriter, FeatureCache, JoinedCaches
from llava_twophase.cache.codec import Channels
from llava_twophase.train.data.prefetch import PrefetchDataset

PAIRS = {
    "bf16 + bf16": (("bfloat16", 1024), ("bfloat16", 1024)),
    "bf16 + int8": (("bfloat16", 1024), ("int8", 1152)),
}
TOKENS = 576
BYTES = {"bfloat16": 2, "int8": 1}


def write(folder, images, dtype, width, seed):
    """Write a cache of random features: eight images' worth, repeated."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((8, TOKENS, width), np.float32)
    channels = Channels(np.zeros(width, "<f4"), np.ones(width, "<f4")) if dtype == "int8" else None
    with CacheWriter(folder, (TOKENS, width), dtype, {"made": seed}, channels=channels, images_per_shard=256) as cache:
        # Another order in each cache, as parallel extractions write them.
        for number in rng.permutation(images).tolist():
            cache.add(f"{number:06d}.jpg", features[number % 8])
    return folder


def aligned(count, row_bytes):
    """Return uint8 [count, row_bytes] that starts at a multiple of 64 bytes, as torch's memory does."""
    return torch.zeros(count, row_bytes, dtype=torch.uint8).numpy()


def read_rows(cache, keys, batch):
    """Return the seconds to read all keys, `batch` rows at a time."""
    rows, buffer = cache.rows(keys), aligned(batch, cache.codec.row_bytes)
    started = time.perf_counter()
    for first in range(0, len(keys), batch):
        cache.read_raw_rows_into(rows[first : first + batch], buffer)
    return time.perf_counter() - started


def deliver(cache, keys, batch):
    """Return the seconds for all batches after the first ones, which fill the ring of buffers."""
    dataset = PrefetchDataset(lambda index: {}, positions, cache, keys, batch)
    loader = Accelerator(cpu=True).prepare(DataLoader(dataset, batch, collate_fn=lambda pending: pending))
    batches, target = iter(loader), None
    for _ in range(WARM_UP):
        features = next(batches)["features"]
        target = torch.empty_like(features) if target is None else target
        target.copy_(features)
    started = time.perf_counter()
    for delivered in batches:
        target.copy_(delivered["features"])
    return time.perf_counter() - started


def measure(paths, args, cold):
    """Return the seconds of every job in every repetition."""
    found = defaultdict(list)
    rng = np.random.default_rng(0)
    names = [f"{number:06d}.jpg" for number in range(args.images)]
    makers = {"first": lambda: FeatureCache(paths[0]), "second": lambda: FeatureCache(paths[1])}
    makers["joined"] = lambda: JoinedCaches(paths)
    jobs = [(how, name) for how in ("rows", "delivered") for name in makers]
    for repetition in range(args.repetitions + 1):
        keys = [names[index] for index in rng.permutation(args.images)]
        keys = keys[: len(keys) // args.batch * args.batch]
        for job in rng.permutation(len(jobs)):
            how, name = jobs[job]
            cache = makers[name]()
            cache.read(keys[:1])
            if cold:
                for path in paths:
                    evict(path)
            seconds = (read_rows if how == "rows" else deliver)(cache, keys, args.batch)
            cache.close()
            if repetition:  # the first one warms up
                found[how, name].append(seconds)
        print(f"{'cold' if cold else 'hot'} {repetition}/{args.repetitions}", file=sys.stderr)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder for the data, 5 GB for 1024 images (default: a temporary folder)")
    parser.add_argument("--images", type=int, default=1024, help="images in each cache (default: 1024)")
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch (default: 32)")
    parser.add_argument("--repetitions", type=int, default=7, help="after one to warm up (default: 7)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="cache_join-", dir=args.folder))
    results = {}
    try:
        for pair, parts in PAIRS.items():
            paths = [
                write(folder / pair / str(number), args.images, dtype, width, number)
                for number, (dtype, width) in enumerate(parts)
            ]
            results[pair] = {cold: measure(paths, args, cold) for cold in (False, True)}
            shutil.rmtree(folder / pair)
    finally:
        shutil.rmtree(folder)
    report(results, args)


def report(results, args):
    table = Table("caches", "files", "how", "one by one, MB/s", "joined, MB/s", "joined / one by one", box=None)
    line = {}
    for pair, kinds in results.items():
        size = sum(TOKENS * width * BYTES[dtype] for dtype, width in PAIRS[pair]) / 1e6
        for cold, found in kinds.items():
            for how in ("rows", "delivered"):
                single = [sum(pair) for pair in zip(found[how, "first"], found[how, "second"], strict=True)]
                ratio = statistics.median(
                    own / joined for own, joined in zip(single, found[how, "joined"], strict=True)
                )
                batches = args.images // args.batch - (WARM_UP if how == "delivered" else 0)
                total = size * batches * args.batch
                rates = [total / statistics.median(times) for times in (single, found[how, "joined"])]
                kind = "cold" if cold else "hot"
                table.add_row(pair, kind, how, *(f"{rate:,.0f}" for rate in rates), f"{ratio:.2f}")
                line[f"{pair}, {kind}, {how}"] = round(ratio, 3)
    console = Console(width=110)
    console.print(f"{platform.platform()}, {os.cpu_count()} cores, {args.images} images")
    console.print(table)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
