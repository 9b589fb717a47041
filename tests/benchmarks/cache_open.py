"""Measure the time to open a cache and the memory of its index, for LLaVA's 558K images and for 20 million.

    python tests/benchmarks/cache_open.py --folder /some/disk/with/3GB

The features of these caches are holes in sparse files; everything else is real. Each cache is opened in a new
process. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from llava_twophase.cache.format import SHARDS, shard_name
from llava_twophase.cache.manifest import Manifest
from llava_twophase.cache.session import CacheSession
from llava_twophase.cache.shard_writer import ShardSpec, ShardWriter

PER_SHARD = 1024
OPEN = """
import json, sys, time
from llava_twophase.cache.reader import FeatureCache

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

before, started, used = resident(), time.perf_counter(), time.process_time()
cache = FeatureCache(sys.argv[1])
seconds, used = time.perf_counter() - started, time.process_time() - used
print(json.dumps({"seconds": seconds, "cpu_seconds": used, "megabytes": resident() - before, "images": len(cache)}))
"""


def make_cache(folder, images):
    """Write a cache without the values of its rows."""
    (folder / SHARDS).mkdir(parents=True)
    fingerprint, entries = {"made": "cache_open.py"}, []
    spec = ShardSpec((576, 1024), "bfloat16", fingerprint, {"made": "here"})
    for number, first in enumerate(range(0, images, PER_SHARD)):
        keys = [f"{row // 1000:05d}/{row:09d}.jpg" for row in range(first, min(first + PER_SHARD, images))]
        writer = ShardWriter(folder / SHARDS / shard_name(number), keys, spec)
        writer._written = len(keys)
        entries.append(writer.seal())
    with CacheSession(folder) as session:
        session.replace(Manifest(fingerprint, {}, PER_SHARD, True, shards=entries))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder for the caches (default: a temporary folder)")
    parser.add_argument("--images", nargs="+", type=int, default=[558_128, 20_000_000])
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    folder, line = Path(tempfile.mkdtemp(prefix="cache_open-", dir=args.folder)), {}
    try:
        for images in args.images:
            print(f"making a cache of {images} images", file=sys.stderr)
            with mock.patch("os.fsync"):  # nothing here has to survive a power failure
                make_cache(folder / str(images), images)
            command = [sys.executable, "-c", OPEN, str(folder / str(images))]
            found = [json.loads(subprocess.check_output(command)) for _ in range(args.repetitions)]
            line[str(images)] = {name: round(statistics.median(run[name] for run in found), 3) for name in found[0]}
            print(f"{images} images: {line[str(images)]}")
    finally:
        shutil.rmtree(folder)
    print(json.dumps({**line, "load": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
