"""Measure what docs/scale.md multiplies: a manifest of many shards, the CPU time of one image, and a plan of records.

    python tests/benchmarks/scale.py --folder /some/disk/with/10GB
    python tests/benchmarks/scale.py --records 0        # without the plan

Each part runs in a new process. CPU seconds are given, because they depend little on other load; peaks are memory above
that of the process before. Shards of the manifest are empty files: reading, writing and updating it opens none. Images
are those of tests/benchmarks/extract.py; rows are bf16 of CLIP-L/14-336, in /dev/shm. *Plan* is what an extraction does
before it looks at images, for a new cache and for one that has all of them. tests/benchmarks/cache_open.py
measures opening, tests/benchmarks/startup.py records, and tests/docs_scale.py has the results. The last line is one
JSON object.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from llava_twophase.cache.format import MANIFEST, SHARDS, shard_name
from llava_twophase.cache.manifest import Manifest, ShardEntry, read_manifest
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.cache.session import CacheSession
from llava_twophase.cache.shard_writer import ShardSpec, ShardWriter

SHAPE = (576, 1024)
IMAGES = 64
MADE = {"made": "scale.py"}


def status(name):
    """Return a size of this process in kB, from /proc."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Clock:
    """CPU seconds and peak memory of a block."""

    def __enter__(self):
        # getrusage's peak is at least that of the process that started this one.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self._before = status("VmRSS")
        self._used = time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds = time.process_time() - self._used
        self.megabytes = (status("VmHWM") - self._before) * 1024 / 1e6

    def found(self):
        return {"cpu_s": round(self.seconds, 4), "peak_mb": round(self.megabytes, 1)}


def make_manifest(folder, shards):
    """Write a manifest and an empty file for each of its shards."""
    (folder / SHARDS).mkdir(parents=True)
    entries = [ShardEntry(shard_name(number), 1024, 1_208_000_512, f"{number:032x}") for number in range(shards)]
    for entry in entries:
        (folder / SHARDS / entry.file).touch()
    with CacheSession(folder) as session, Clock() as clock:
        session.replace(Manifest(MADE, {}, 1024, shards=entries))
    return {**clock.found(), "file_mb": round((folder / MANIFEST).stat().st_size / 1e6, 1)}


def read(folder, _):
    with Clock() as clock:
        read_manifest(folder)
    return clock.found()


def update(folder, shards):
    """One update of the manifest after a shard was sealed."""
    with CacheSession(folder) as session:
        before = session.manifest
        writer = ShardWriter(folder / SHARDS / shard_name(shards), ["a.jpg"], ShardSpec((1, 32), "bfloat16", MADE, {}))
        writer.append(np.zeros((1, 1, 32), "<u2"), [(0, bytes(32))])
        writer.seal()
        with Clock() as clock:
            listed = len(session.update().shards)
        assert listed == shards + 1
        session.replace(before)
    (folder / SHARDS / shard_name(shards)).unlink()
    return clock.found()


def decode(folder, _):
    """One image: read, decode, resize, crop."""
    from extract import PROCESSOR, write_pictures
    from llava_twophase.extract.decode import DecodeDataset
    from llava_twophase.vision.preprocess import Preprocessor
    from llava_twophase.vision.sources import ImageFolder

    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    keys = write_pictures(folder, IMAGES)
    batches = DecodeDataset(ImageFolder(folder), Preprocessor(str(folder)), [keys[:2], keys])
    batches[0]
    with Clock() as clock:
        batches[1]
    return {"cpu_s": round(clock.seconds / IMAGES, 6)}


def rows(folder, _):
    """One stored row: written and hashed; read and checked."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    (folder / SHARDS).mkdir()
    keys, spec = [f"{row}.jpg" for row in range(IMAGES)], ShardSpec(SHAPE, "bfloat16", MADE, {})
    values = np.random.default_rng(0).integers(0, 1 << 14, (IMAGES, *SHAPE)).astype("<u2")
    writer = ShardWriter(folder / SHARDS / shard_name(0), keys, spec)
    with Clock() as writing:
        writer.append(values, [(0, bytes(32))] * IMAGES)
    with CacheSession(folder) as session:
        session.replace(Manifest(MADE, {}, IMAGES, True, shards=[writer.seal()]))
    cache = FeatureCache(folder)
    buffer = cache.read_raw(keys)
    with Clock() as reading:
        cache.read_raw_into(keys, buffer)
    return {"write_cpu_s": round(writing.seconds / IMAGES, 6), "read_cpu_s": round(reading.seconds / IMAGES, 6)}


def plan(folder, cached):
    """Read the records, whose columns are kept already, and plan their extraction."""
    from llava_twophase.cache.session import existing_manifest
    from llava_twophase.extract.config import ExtractConfig
    from llava_twophase.extract.preflight import open_inputs, plan_extraction
    from llava_twophase.records import load_records

    cache = folder / ("cache" if cached else "new")
    config = ExtractConfig(str(folder / "records.json"), str(folder / "images"), "tower", cache)
    with Clock() as clock:
        found = plan_extraction(open_inputs(config, load_records(config.data_path)), existing_manifest(cache))
    assert bool(found.work) != cached
    return clock.found()


def measure_plans(folder, records):
    """Return what planning an extraction of many records takes."""
    from startup import write_cache, write_records

    from llava_twophase.records import load_records

    (folder / "images").mkdir(parents=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "home")
    write_records(folder / "records.json", records)
    with mock.patch("os.fsync"):
        write_cache(folder / "cache", records)
    load_records(folder / "records.json")
    kept = sum(file.stat().st_size for file in (folder / "home").rglob("*") if file.is_file())
    sizes = {"json_mb": round((folder / "records.json").stat().st_size / 1e6), "columns_mb": round(kept / 1e6)}
    plans = {"plan, new": run_alone(plan, folder, False), "plan, all cached": run_alone(plan, folder, True)}
    return {"records": sizes, **plans}


def run_alone(part, *arguments):
    """Return what a part measured in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(part, arguments)


def smallest(part, repetitions, *arguments):
    """Return the smallest of each figure over several processes: other load only adds to CPU time."""
    found = [run_alone(part, *arguments) for _ in range(repetitions)]
    return {name: min(run[name] for run in found) for name in found[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder for the manifest (default: a temporary folder)")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--records", type=int, default=12_000_000, help="records to plan for (default: 12 million)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder, line = Path(tempfile.mkdtemp(prefix="scale-", dir=args.folder)), {}
    memory = Path(tempfile.mkdtemp(prefix="scale-", dir="/dev/shm"))
    try:
        line["manifest written"] = run_alone(make_manifest, folder / "cache", args.shards)
        for name, part in {"manifest read": read, "manifest updated": update}.items():
            line[name] = smallest(part, args.repetitions, folder / "cache", args.shards)
        line["image decoded"] = smallest(decode, args.repetitions, memory, 0)
        line["row"] = smallest(rows, args.repetitions, memory, 0)
        if args.records:
            line |= measure_plans(folder / "plan", args.records)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(memory)
    for name, found in line.items():
        print(f"{name}: {found}")
    print(json.dumps({**line, "shards": args.shards, "of": args.records, "load": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
