"""Measure the cost of sealing a shard beyond writing its bytes, and the share of checksums in it.

    python tests/benchmarks/cache_write.py --folder /some/disk

Every method writes the same batches of bfloat16 rows to a new file and syncs it: plain positioned writes (the limit),
this project's writer, and the same writer without checksums and without the check for finite values. The order is
random in each repetition; ratios are within a repetition, and the results are medians. An extraction writes in
threads while the tower computes: `checksums_of_extraction` is the time of the row checksums divided by the total time
at --images_per_second. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.table import Table

from llava_twophase.cache import shard_writer as writer
from llava_twophase.cache.codec import Codec
from llava_twophase.cache.shard_writer import ShardSpec, ShardWriter, pwrite_all, sha256

SHAPE = (576, 1024)
SPEC = ShardSpec(SHAPE, "bfloat16", {"made": "cache_write.py"}, {})


def plain(folder, keys, batches):
    descriptor = os.open(folder / "plain", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    offset = 0
    for batch in batches:
        pwrite_all(descriptor, batch, offset)
        offset += batch.nbytes
    os.fsync(descriptor)
    os.close(descriptor)


def ours(folder, keys, batches):
    shard, first = ShardWriter(folder / "shard-000000.h5", keys, SPEC), 0
    for batch in batches:
        shard.append(batch, [(1, sha256(key.encode())) for key in keys[first : first + len(batch)]])
        first += len(batch)
    shard.seal()


def without(*names):
    """Return the writer without some of its work."""
    replaced = {
        "row checksums": lambda: patch.object(writer.xxhash, "xxh3_64_intdigest", lambda data: 0),
        "shard checksum": lambda: patch.object(writer, "checksum_around", lambda *_: "0" * 32),
        "finite": lambda: patch.object(Codec, "finite", lambda self, rows: np.ones(len(rows), bool)),
    }

    def run(folder, keys, batches):
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(replaced[name]())
            ours(folder, keys, batches)

    return run


METHODS = {
    "plain writes (limit)": plain,
    "this project": ours,
    "without checksums": without("row checksums", "shard checksum"),
    "without checksums, finite": without("row checksums", "shard checksum", "finite"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder for the data, about 0.6 GB (default: a temporary folder)")
    parser.add_argument("--images", type=int, default=512, help="rows of 1.18 MB in a shard (default: 512)")
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch (default: 32)")
    parser.add_argument("--repetitions", type=int, default=9, help="after one to warm up (default: 9)")
    parser.add_argument("--images_per_second", type=float, default=500, help="of an extraction (default: 500)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    keys = [f"{row:06d}.jpg" for row in range(args.images)]
    batches = [rng.integers(0, 0x7F00, (args.batch, *SHAPE), np.uint16) for _ in range(args.images // args.batch)]
    keys = keys[: len(batches) * args.batch]
    folder, seconds = Path(tempfile.mkdtemp(prefix="cache_write-", dir=args.folder)), defaultdict(list)
    try:
        for repetition in range(args.repetitions + 1):
            for name in rng.permutation(list(METHODS)).tolist():
                started = time.perf_counter()
                METHODS[name](folder, keys, batches)
                if repetition:  # the first one warms up
                    seconds[name].append(time.perf_counter() - started)
                for path in folder.iterdir():
                    path.unlink()
                os.sync()
    finally:
        shutil.rmtree(folder)
    report(seconds, len(keys), args)


def report(seconds, images, args):
    def ratio(name, other):
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))

    megabytes = images * SHAPE[0] * SHAPE[1] * 2 / 1e6
    table = Table("method", "MB/s, synced", "time over plain writes", box=None)
    for name in METHODS:
        table.add_row(
            name, f"{megabytes / statistics.median(seconds[name]):,.0f}", f"{ratio(name, 'plain writes (limit)'):.3f}"
        )
    console = Console(width=110)
    console.print(f"{platform.platform()}, {os.cpu_count()} cores, {images} images of 1.18 MB")
    console.print(table)
    row = np.zeros(SHAPE, np.uint16)
    started = time.perf_counter()
    for _ in range(200):
        writer.xxhash.xxh3_64_intdigest(row)
    checksum = (time.perf_counter() - started) / 200
    line = {
        "writer_over_plain": ratio("this project", "plain writes (limit)"),
        "checksums_of_writer": ratio("this project", "without checksums") - 1,
        "checksum_ms_an_image": 1e3 * checksum,
        "checksums_of_extraction": checksum * args.images_per_second,
    }
    console.print(f"checksums take {line['checksums_of_extraction']:.2%} at {args.images_per_second:g} images/s")
    print(json.dumps({name: round(value, 4) for name, value in line.items()}))


if __name__ == "__main__":
    main()
