"""Compare the read speed of this project with its limit and with common formats, on the same data.

    python tests/benchmarks/cache_read.py --folder /some/disk/with/10GB

Every method reads the same random rows into the same batch. The order of the methods is random in each repetition,
and each time is divided by the limit of that repetition: plain positioned reads of the same rows. The results are
medians over repetitions. *Hot* reads from the page cache; for *cold* the files are evicted before each measurement
(the host of a virtual machine may still have them). *Delivered* includes the data loader and a copy of the batch, as
a copy to a GPU would be. The last line is one JSON object. Formats that are not installed are skipped: pip install -e
'.[bench]'.
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
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from llava_twophase import CacheWriter, FeatureCache
from llava_twophase.cache.format import SHARDS
from llava_twophase.train.data.prefetch import PrefetchDataset

SHAPE = (576, 1024)
ROW = SHAPE[0] * SHAPE[1] * 2
METHODS = {}
WARM_UP = 4  # batches: one more than this project keeps memory for


def method(name, module, sequential=False):
    def register(function):
        function.label = name
        function.module = module
        function.sequential = sequential
        METHODS[name] = function
        return function

    return register


def make_cache(folder, images, per_shard=512):
    """Write a cache of random bits; the time to read does not depend on the values."""
    rng = np.random.default_rng(0)
    with CacheWriter(folder, SHAPE, "bfloat16", {"made": "cache_read.py"}, images_per_shard=per_shard) as cache:
        for row in range(images):
            bits = rng.integers(0, 0x7F00, SHAPE, np.uint16)
            cache.add(f"{row:06d}.jpg", (bits.astype(np.uint32) << 16).view(np.float32))
    return FeatureCache(folder)


# Each function writes the rows in its format unless the file exists, and returns a function that reads rows by number.


def limit(cache, folder):
    places = []
    for entry, header in zip(cache.manifest.shards, cache.headers, strict=True):
        descriptor = os.open(cache.path / SHARDS / entry.file, os.O_RDONLY)
        offset = header.datasets["features"].offset
        places += [(descriptor, offset + row * ROW) for row in range(header.rows)]

    def read(rows, batch):
        view = memoryview(batch.reshape(-1).view(np.uint8))
        for position, row in enumerate(rows.tolist()):
            descriptor, offset = places[row]
            os.preadv(descriptor, [view[position * ROW : (position + 1) * ROW]], offset)

    return read, lambda: [os.close(descriptor) for descriptor in {descriptor for descriptor, _ in places}]


def ours(cache, folder):
    mine = FeatureCache(cache.path)
    return mine.read_raw_rows_into, mine.close


def ours_in_flight(cache, folder):
    from concurrent.futures import ThreadPoolExecutor

    mine, pool = FeatureCache(cache.path), ThreadPoolExecutor(4)

    def read(rows, batch):
        parts = np.array_split(np.arange(len(rows)), 4)
        list(pool.map(lambda part: mine.read_raw_rows_into(rows[part], batch[part[0] : part[-1] + 1]), parts))

    return read, pool.shutdown


@method("h5py, row by row", "h5py")
def with_h5py(cache, folder):
    import h5py

    path = folder / "features.h5"
    if not path.exists():
        with h5py.File(path, "w") as file:
            dataset = file.create_dataset("features", (len(cache), *SHAPE), np.uint16)
            for row, values in all_rows(cache):
                dataset[row] = values
    file = h5py.File(path, "r")
    return row_by_row(file["features"]), file.close


@method("numpy memmap", "numpy")
def with_memmap(cache, folder):
    path = folder / "features.npy"
    if not path.exists():
        array = np.lib.format.open_memmap(path, "w+", np.uint16, (len(cache), *SHAPE))
        for row, values in all_rows(cache):
            array[row] = values
        array.flush()
    return row_by_row(np.load(path, mmap_mode="r")), lambda: None


@method("safetensors", "safetensors")
def with_safetensors(cache, folder):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = folder / "features.safetensors"
    if not path.exists():
        save_file({f"{row:06d}": torch.from_numpy(v).view(torch.bfloat16) for row, v in all_rows(cache)}, path)
    file = safe_open(path, "pt")

    def read(rows, batch):
        target = torch.from_numpy(batch).view(torch.bfloat16)
        for position, row in enumerate(rows.tolist()):
            target[position] = file.get_tensor(f"{row:06d}")

    return read, lambda: None


@method("zarr, a chunk an image", "zarr")
def with_zarr(cache, folder):
    import zarr

    path = folder / "features.zarr"
    if not path.exists():
        made = zarr.create_array(
            path, shape=(len(cache), *SHAPE), chunks=(1, *SHAPE), dtype="uint16", compressors=None, filters=None
        )
        for row, values in all_rows(cache):
            made[row] = values
    return row_by_row(zarr.open_array(path, mode="r")), lambda: None


@method("LMDB", "lmdb")
def with_lmdb(cache, folder):
    import lmdb

    path = folder / "features.lmdb"
    if not path.exists():
        with lmdb.open(str(path), map_size=2 * len(cache) * ROW) as made, made.begin(write=True) as transaction:
            for row, values in all_rows(cache):
                transaction.put(b"%06d" % row, values.tobytes())
    environment = lmdb.open(str(path), readonly=True, lock=False)

    def read(rows, batch):
        with environment.begin(buffers=True) as transaction:
            for position, row in enumerate(rows.tolist()):
                batch[position] = np.frombuffer(transaction.get(b"%06d" % row), np.uint16).reshape(SHAPE)

    return read, environment.close


@method("webdataset, in file order", "webdataset", sequential=True)
def with_webdataset(cache, folder):
    import webdataset

    path = folder / "features.tar"
    if not path.exists():
        with webdataset.TarWriter(str(path)) as tar:
            for row, values in all_rows(cache):
                tar.write({"__key__": f"{row:06d}", "bin": values.tobytes()})
    samples = iter(webdataset.WebDataset(str(path), shardshuffle=False))

    def read(rows, batch):
        for position in range(len(rows)):
            batch[position] = np.frombuffer(next(samples)["bin"], np.uint16).reshape(SHAPE)

    return read, lambda: None


def row_by_row(array):
    def read(rows, batch):
        for position, row in enumerate(rows.tolist()):
            batch[position] = array[row]

    return read


def all_rows(cache):
    """Yield number and values of every row, each as a new array."""
    for row, key in enumerate(cache.keys()):
        yield row, cache.read_raw([key])[0]


class Items(Dataset):
    """The common way: each worker opens the file with h5py, and a sample is a tensor."""

    def __init__(self, path):
        self.path, self.file = path, None

    def __getitem__(self, row):
        import h5py

        self.file = self.file or h5py.File(self.path, "r")
        return {"features": torch.from_numpy(self.file["features"][row]).view(torch.bfloat16)}


def usual_loader(cache, folder, rows, batch):
    with_h5py(cache, folder)[1]()
    return DataLoader(Items(folder / "features.h5"), batch, sampler=rows.tolist(), num_workers=2)


def positions(samples):
    return {"position_in_batch": torch.stack([sample["position_in_batch"] for sample in samples])}


def our_loader(cache, folder, rows, batch):
    dataset = PrefetchDataset(lambda index: {}, positions, cache, list(cache.keys()), batch)
    loader = DataLoader(dataset, batch, sampler=rows.tolist(), collate_fn=lambda pending: pending)
    return Accelerator(cpu=True).prepare(loader)


def evict(folder):
    """Drop all files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure_reading(make, cache, folder, rows, batch, cold):
    """Return the MB/s of one method over all rows; with `cold`, the page cache is empty at the start."""
    if cold:
        evict(folder)
    read, close = make(cache, folder)
    started = time.perf_counter()
    for first in range(0, len(rows), len(batch)):
        read(rows[first : first + len(batch)], batch)
    seconds = time.perf_counter() - started
    close()
    return len(rows) * ROW / seconds / 1e6


def measure_delivery(make, cache, folder, rows, batch, cold):
    """Return the MB/s from a data loader into a fixed batch, after its workers have started."""
    if cold:
        evict(folder)
    target = torch.from_numpy(batch).view(torch.bfloat16)
    batches = iter(make(cache, folder, rows, len(batch)))
    for _ in range(WARM_UP):
        target.copy_(next(batches)["features"])
    started, count = time.perf_counter(), 0
    for delivered in batches:
        target.copy_(delivered["features"])
        count += len(batch)
    return count * ROW / (time.perf_counter() - started) / 1e6


def measure(cache, folder, args, cold):
    """Return the MB/s of every method in every repetition, in random order."""
    # torch's memory starts at a multiple of 64 bytes. numpy's does not, which halves the speed of every method.
    batch = torch.zeros(args.batch, *SHAPE, dtype=torch.uint16).numpy()
    turns = {"limit": limit, "this project": ours, "this project, 4 in flight": ours_in_flight}
    turns |= {name: make for name, make in METHODS.items() if find_spec(make.module)}
    loaders = {"delivered: DataLoader, 2 workers": usual_loader, "delivered: this project": our_loader}
    jobs = [(measure_reading, name, make) for name, make in turns.items()]
    jobs += [(measure_delivery, name, make) for name, make in loaders.items()]
    rng = np.random.default_rng(0)
    found = defaultdict(list)
    for repetition in range(args.repetitions + 1):
        rows = rng.permutation(len(cache))[: args.cold_images if cold else None]
        rows = rows[: len(rows) // args.batch * args.batch]
        for job in rng.permutation(len(jobs)):
            function, name, make = jobs[job]
            speed = function(make, cache, folder, rows, batch, cold)
            if repetition:  # the first one warms up
                found[name].append(speed)
        print(f"{'cold' if cold else 'hot'} {repetition}/{args.repetitions}", file=sys.stderr)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder for the data, about 8 times their size (default: a temporary folder)")
    parser.add_argument("--images", type=int, default=1024, help="rows of 1.18 MB (default: 1024)")
    parser.add_argument("--cold_images", type=int, default=512, help="rows of a cold measurement (default: 512)")
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch (default: 32)")
    parser.add_argument("--repetitions", type=int, default=7, help="after one to warm up (default: 7)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for make in METHODS.values():
        if not find_spec(make.module):
            print(f"{make.label}: skipped, pip install {make.module}", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="cache_read-", dir=args.folder))
    try:
        cache = make_cache(folder / "cache", args.images)
        speeds = {"hot": measure(cache, folder, args, cold=False), "cold": measure(cache, folder, args, cold=True)}
    finally:
        shutil.rmtree(folder)
    report(speeds, args)


def report(speeds, args):
    ratios = {
        kind: {
            name: statistics.median(own / top for own, top in zip(values, found["limit"], strict=True))
            for name, values in found.items()
        }
        for kind, found in speeds.items()
    }
    table = Table("method", "hot MB/s", "of the limit", "cold MB/s", "of the limit", box=None)
    for name in speeds["hot"]:
        cells = [f"{statistics.median(speeds[kind][name]):,.0f} {ratios[kind][name]:.2f}" for kind in ("hot", "cold")]
        table.add_row(name, *" ".join(cells).split())
    console = Console(width=110)
    console.print(f"{platform.platform()}, {os.cpu_count()} cores, {args.images} images of 1.18 MB")
    console.print(table)
    random = [name for name, make in METHODS.items() if name in ratios["hot"] and not make.sequential]
    line = {"delivered_over_limit": ratios["hot"]["delivered: this project"]}
    for kind in ("hot", "cold"):
        line[f"ours_over_limit_{kind}"] = ratios[kind]["this project"]
        line[f"ours_in_flight_over_limit_{kind}"] = ratios[kind]["this project, 4 in flight"]
        found = speeds[kind]
        best = max(random, key=lambda name: ratios[kind][name])
        line[f"best_method_{kind}"] = best
        line[f"ours_over_best_method_{kind}"] = statistics.median(
            own / other for own, other in zip(found["this project"], found[best], strict=True)
        )
    line["delivered_over_limit_cold"] = ratios["cold"]["delivered: this project"]
    line["usual_delivered_over_limit"] = ratios["hot"]["delivered: DataLoader, 2 workers"]
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in line.items()}))


if __name__ == "__main__":
    main()
