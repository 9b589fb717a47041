"""Measure the time to open a cache, and the memory of its index in one and in several processes.

    python tests/benchmarks/cache_open.py --folder /some/disk/with/4GB
    python tests/benchmarks/cache_open.py --images 100_000_000 --repetitions 3 --folder /some/disk/with/20GB

The features of these caches are holes in sparse files; everything else is real. Each process is new. *First* makes the
shared index of a large cache, *later* opens it, and *own copy* is a process without one. Memory is that of /proc's
smaps_rollup after opening, less that before: USS are the pages of one process alone, and PSS counts a page that n
processes share as 1/n. The last line is one JSON object.
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
import json, resource, sys, time
import numpy as np
from llava_twophase.cache import opening
from llava_twophase.cache.reader import FeatureCache

def memory():
    lines = (line.split() for line in open("/proc/self/smaps_rollup") if line.endswith("kB\\n"))
    sizes = {name: int(size) / 1e3 for name, size, _ in lines}
    return {"pss": sizes["Pss:"], "uss": sizes["Private_Clean:"] + sizes["Private_Dirty:"]}

if sys.argv[2] == "own":
    opening.SHARED_FROM = float("inf")
before, started, used = memory(), time.perf_counter(), time.process_time()
cache = FeatureCache(sys.argv[1])
seconds, used = time.perf_counter() - started, time.process_time() - used
for array in (cache._index._names, cache._index._entries, cache._rows._checksums):
    np.asarray([] if array is None else array).view(np.uint8)[::4096].sum()  # as a run uses all of it
print("open", flush=True)
sys.stdin.readline()  # until all processes have opened it
after = memory()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before["pss"]
sizes = {f"{name}_mb": after[name] - before[name] for name in after}
print(json.dumps({"seconds": seconds, "cpu_seconds": used, "peak_mb": peak, **sizes}), flush=True)
sys.stdin.readline()  # until all have measured
"""


def open_in(cache, mode, processes=1):
    """Open a cache in several processes at the same time; return what each measured while all had it open."""
    command = [sys.executable, "-c", OPEN, str(cache), mode]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(processes)]
    for process in running:
        if process.stdout.readline() != "open\n":
            raise SystemExit(f"{cache} could not be opened")
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
        # It ends only after all have been measured: its pages are shared until then.
        process.result = json.loads(process.stdout.readline())
    for process in running:
        process.stdin.close()
        process.wait()
    return [process.result for process in running]


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


def available_bytes():
    """Return the memory that new processes can use."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def median(found):
    """Return the medians of what several processes measured."""
    return {name: round(statistics.median(run[name] for run in found), 3) for name in found[0]}


def measure(cache, processes, repetitions):
    """Return what one and several processes measured, by how they opened a cache."""
    rows = {
        "first": median(open_in(cache, "shared")),
        "later": median([open_in(cache, "shared")[0] for _ in range(repetitions)]),
        "own copy": median([open_in(cache, "own")[0] for _ in range(repetitions)]),
    }
    for name, mode in (("later", "shared"), ("own copy", "own")):
        if mode == "own" and processes * rows[name]["peak_mb"] * 1e6 > 0.6 * available_bytes():
            print(
                f"{processes} processes with a copy each are not measured: they need too much memory", file=sys.stderr
            )
            continue
        together = open_in(cache, mode, processes)
        rows[f"{name}, {processes} processes, each"] = median(together)
        rows[f"{name}, {processes} processes"] = {"pss_mb": round(sum(run["pss_mb"] for run in together), 1)}
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder for the caches (default: a temporary folder)")
    parser.add_argument("--images", nargs="+", type=int, default=[558_128, 20_000_000])
    parser.add_argument("--processes", type=int, default=8, help="processes at the same time (default: 8)")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    folder, line = Path(tempfile.mkdtemp(prefix="cache_open-", dir=args.folder)), {}
    os.environ["XDG_CACHE_HOME"] = str(folder / "home")
    try:
        for images in args.images:
            print(f"making a cache of {images} images", file=sys.stderr)
            with mock.patch("os.fsync"):  # nothing here has to survive a power failure
                make_cache(folder / str(images), images)
            line[str(images)] = measure(folder / str(images), args.processes, args.repetitions)
            for name, found in line[str(images)].items():
                print(f"{images:,} images, {name}: {found}")
    finally:
        shutil.rmtree(folder)
    print(json.dumps({**line, "load": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
