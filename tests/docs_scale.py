"""Compute the tables of docs/scale.md: time, storage, traffic, memory and money by number of images and GPUs.

    python tests/docs_scale.py                                  # write the tables of the page
    python tests/docs_scale.py --gpu_hour_usd 4 --gpus 16 128   # print them for other inputs, and write nothing

MEASURED has what was measured, with its command; everything else is multiplied from it and from the inputs.
"""

import argparse
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from llava_twophase.cache.format import row_bytes
from llava_twophase.cache.opening import SHARED_FROM

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scale.md"
SHAPE = (576, 1024)
STORAGES = {"bf16": "bfloat16", "int8": "int8", "int4": "int4"}
PER_SHARD = 1024
OPEN, SCALE = "tests/benchmarks/cache_open.py", "tests/benchmarks/scale.py"
PAPER = "tests/benchmarks/break_even.py --paper 1"

# What it is, value, unit, command. CPU seconds of one core of an AMD EPYC.
MEASURED = {
    "decode": ("read, decode, resize and crop a JPEG of 60 kB", 0.0052, "CPU s per image", SCALE),
    "write": ("write a bf16 row and hash it", 0.0009, "CPU s per image", SCALE),
    "read": ("read a bf16 row and compare its checksum", 0.0003, "CPU s per image", SCALE),
    "manifest_bytes": ("entry of a shard in the manifest", 135, "bytes per shard", SCALE),
    "manifest_read": ("read the manifest", 3.7e-6, "CPU s per shard", SCALE),
    "manifest_peak": ("peak memory of reading it", 700, "bytes per shard", SCALE),
    "manifest_update": ("list the shards and write the manifest", 4.0e-6, "CPU s per shard", SCALE),
    "index_bytes": ("shared index: hash, key of 19 bytes, row checksum", 35.0, "bytes per image", f"{OPEN} (100M)"),
    "index_peak": ("peak memory of the process that makes it", 68, "bytes per image", f"{OPEN} (100M)"),
    "shard_bytes": ("private memory of a process that has a cache open", 640, "bytes per shard", f"{OPEN} (100M)"),
    "record_bytes": ("records as shared columns; in JSON 253 bytes", 121, "bytes per record", f"{SCALE} (12M)"),
    "plan_new": ("plan an extraction of 12M records, none cached", 13.4, "CPU s", f"{SCALE} (12M)"),
    "plan_cached": ("plan an extraction of 12M records, all cached", 54, "CPU s", f"{SCALE} (12M)"),
    "own_bytes": ("an index that is not shared", 27.1, "bytes per image", f"{OPEN} (100M)"),
}  # fmt: skip
# Images and CPU seconds of the process that opens a cache. The first one makes the shared index, from SHARED_FROM on.
OPENING = {
    "first": ((558_128, 0.07), (20_000_000, 4.9), (100_000_000, 62.0)),
    "later": ((558_128, 0.07), (20_000_000, 0.47), (100_000_000, 2.7)),
}
# Operations, computed from shapes by PAPER. The tower is CLIP-L/14-336, a sample has 576 image tokens and 15 others.
TOWER_TFLOP = 1 / 2.732
STEP_TFLOP = {"7B": 15.58396, "13B": 30.42308}


@dataclass(frozen=True)
class Inputs:
    """What was assumed, and can be given as a flag. Prices are assumed list prices, not those of a provider."""

    images: tuple[int, ...] = (558_128, 12_000_000, 1_000_000_000)
    gpus: tuple[int, ...] = (8, 64, 512)
    gpus_per_node: int = 8
    gpu_tflops: float = 989.0
    utilisation: float = 0.4
    cores_per_node: int = 96
    node_write_gb_s: float = 5.0
    shared_write_gb_s: float = 100.0
    gpu_hour_usd: float = 2.5
    object_gb_month_usd: float = 0.023
    disk_gb_month_usd: float = 0.14
    million_requests_usd: float = 0.4
    egress_gb_usd: float = 0.0

    @property
    def images_per_second(self):
        """Images per second of the tower on one GPU."""
        return self.gpu_tflops * self.utilisation / TOWER_TFLOP

    def samples_per_second(self, llm):
        """Samples per second of a training step on one GPU."""
        return self.gpu_tflops * self.utilisation / STEP_TFLOP[llm]

    def nodes(self, gpus):
        return -(-gpus // self.gpus_per_node)


NOTES = {
    "gpus_per_node": "GPUs and ranks of a node",
    "gpu_tflops": "bf16 TFLOP/s in the data sheet of an H100 SXM",
    "utilisation": "part of it that is reached",
    "cores_per_node": "CPU cores of a node",
    "node_write_gb_s": "GB/s that a node writes",
    "shared_write_gb_s": "GB/s that the shared file system takes from all nodes",
    "gpu_hour_usd": "USD for an hour of a GPU",
    "object_gb_month_usd": "USD for a GB and month of object storage",
    "disk_gb_month_usd": "USD for a GB and month of a parallel file system",
    "million_requests_usd": "USD for a million requests to object storage",
    "egress_gb_usd": "USD for a GB of rows that leaves object storage; 0 if the GPUs are in the bucket's region",
}


def value(name):
    return MEASURED[name][1]


def bytes_of(storage):
    return row_bytes(STORAGES[storage], SHAPE)


def shards_of(images):
    return -(-images // PER_SHARD)


def number(amount):
    """Return a number with two or three digits that count."""
    if amount >= 100:
        return f"{amount:,.0f}"
    return f"{amount:.1f}" if amount >= 1 else f"{amount:.2g}"


def named(images):
    """Return a number of images as the page writes it."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if images >= scale:
            return f"{images / scale:.0f}{unit}"
    return str(images)


def size(count):
    """Return bytes with a unit."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{number(count / 1e6)} MB"


def duration(seconds):
    if seconds < 120:
        return f"{number(seconds)} s"
    if seconds < 7200:
        return f"{number(seconds / 60)} min"
    return f"{number(seconds / 3600)} h" if seconds < 2 * 86400 else f"{number(seconds / 86400)} days"


def money(usd):
    return f"{number(usd)} USD" if usd >= 1 else "< 1 USD"


def opening(process, images):
    """Return the CPU time of opening a cache: between measured points, or what proportion and measured growth give."""
    points = OPENING[process]
    (most, seconds), (before, seconds_before) = points[-1], points[-2]
    if images <= most:
        return duration(float(np.interp(images, *zip(*points, strict=True))))
    growth = math.log(seconds / seconds_before, most / before)
    return f"{duration(seconds * images / most)} to {duration(seconds * (images / most) ** growth)}"


def table(header, rows):
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def measured_table(_):
    """Return what was measured, and by which command."""
    rows = [(what, f"{amount:g} {unit}", f"`{command}`") for what, amount, unit, command in MEASURED.values()]
    for process, points in OPENING.items():
        images, seconds = (", ".join(cells) for cells in zip(*((named(n), f"{s:g}") for n, s in points), strict=True))
        what = "; makes the shared index from 2M on" if process == "first" else ""
        rows.append((f"{process} opening of a cache of {images} images{what}", f"{seconds} CPU s", f"`{OPEN}`"))
    flops = [("tower", TOWER_TFLOP), *((f"step of {llm}", flop) for llm, flop in STEP_TFLOP.items())]
    rows += [(f"operations: {what}", f"{flop:.3g} TFLOP per image", f"`{PAPER}`") for what, flop in flops]
    return table(("what", "value", "command"), rows)


def inputs_table(inputs):
    """Return what was assumed."""
    return table(
        ("flag", "value", "what"), [(f"`--{name}`", f"{getattr(inputs, name):g}", what) for name, what in NOTES.items()]
    )


def storage_table(inputs):
    """Return the size of a cache, and what it costs to keep and to make again."""
    rows = []
    for images in inputs.images:
        again = images / inputs.images_per_second / 3600 * inputs.gpu_hour_usd
        for storage in STORAGES:
            total = images * bytes_of(storage)
            months = (inputs.object_gb_month_usd, inputs.disk_gb_month_usd)
            rows.append(
                (named(images), storage, size(total), *(money(total / 1e9 * price) for price in months), money(again))
            )
    return table(
        ("images", "storage", "size", "object storage, a month", "file system, a month", "extraction, GPUs alone"), rows
    )


def extraction_table(inputs):
    """Return what an extraction needs, and what limits it."""
    rows = []
    for images in inputs.images:
        for gpus in inputs.gpus:
            nodes, rate = inputs.nodes(gpus), gpus * inputs.images_per_second
            cores = rate / nodes * (value("decode") + value("write"))
            write = min(nodes * inputs.node_write_gb_s, inputs.shared_write_gb_s) * 1e9
            decoded = inputs.cores_per_node * nodes / (value("decode") + value("write"))
            cells, prices = [], []
            for storage in ("bf16", "int4"):
                rates = {"GPU": rate, "decoding": decoded, "disk": write / bytes_of(storage)}
                limit = min(rates, key=rates.get)
                cells.append(f"{duration(images / rates[limit])}, {limit}")
                # GPUs that wait for the disk are paid too.
                prices.append(money(images / rates[limit] / 3600 * gpus * inputs.gpu_hour_usd))
            bandwidth = f"{number(rate * bytes_of('bf16') / 1e9)} GB/s"
            rows.append((named(images), gpus, duration(images / rate), f"{cores:.0f}", bandwidth, *cells, *prices))
    header = (
        "images",
        "GPUs",
        "GPUs alone",
        "cores of a node",
        "bf16 writes",
        "bf16: time, limit",
        "int4: time, limit",
        "price, bf16",
        "price, int4",
    )
    return table(header, rows)


def training_table(inputs):
    """Return time and traffic of one epoch."""
    rows = []
    for images in inputs.images:
        for gpus in inputs.gpus:
            cells = []
            for llm in STEP_TFLOP:
                rate = gpus * inputs.samples_per_second(llm)
                cells += [duration(images / rate), f"{number(rate * bytes_of('bf16') / 1e9)} GB/s"]
            rows.append((named(images), gpus, *cells))
    header = ("images", "GPUs", *(cell for llm in STEP_TFLOP for cell in (f"{llm}: an epoch", f"{llm}: all read")))
    return table(header, rows)


def money_table(inputs):
    """Return what one epoch costs, on any number of GPUs."""
    rows = []
    for images in inputs.images:
        tower = images / inputs.images_per_second / 3600 * inputs.gpu_hour_usd
        epochs = [images / inputs.samples_per_second(llm) / 3600 * inputs.gpu_hour_usd for llm in STEP_TFLOP]
        read = images / 1e6 * inputs.million_requests_usd + images * bytes_of("bf16") / 1e9 * inputs.egress_gb_usd
        start = max(inputs.gpus) * shards_of(images) * 2 / 1e6 * inputs.million_requests_usd
        rows.append((named(images), *map(money, epochs), money(tower), money(read), money(start)))
    header = (
        "images",
        *(f"{llm}, GPUs" for llm in STEP_TFLOP),
        "tower on the fly, GPUs",
        "bf16 rows from object storage",
        f"a start of {max(inputs.gpus)} ranks, at most",
    )
    return table(header, rows)


def memory_table(inputs):
    """Return the memory of a node for opening a cache, and what a start requests."""
    rows = []
    ranks = inputs.gpus_per_node
    for images in inputs.images:
        shards = shards_of(images)
        shared = images >= SHARED_FROM
        private = ranks * shards * value("shard_bytes")
        # A rank without a shared index has the checksums of the rows, 8 bytes each, beside its own.
        not_shared = ranks * images * (value("own_bytes") + 8) + private
        opened = images * value("index_bytes") + private if shared else not_shared
        opens = max(inputs.gpus) * shards
        rows.append(
            (named(images), f"{shards:,}", size(shards * value("manifest_bytes")), size(opened), size(not_shared),
             size(images * value("record_bytes")), opening("first", images) if shared else "none",
             opening("later", images),
             f"{number(opens / 1e6)} million")
        )  # fmt: skip
    header = (
        "images",
        "shards",
        "manifest",
        "cache open, a node",
        "not shared",
        "records, a node",
        "index made once, CPU",
        "later starts, CPU",
        f"files opened by {max(inputs.gpus)} ranks",
    )
    return table(header, rows)


def manifest_table(inputs):
    """Return what the manifest of an extraction costs, in CPU time."""
    rows = []
    for images in inputs.images:
        shards = shards_of(images)
        once = shards * value("manifest_update")
        read, every = duration(shards * value("manifest_read")), duration(shards * once / 2)
        rows.append((named(images), f"{shards:,}", read, duration(once), every))
    return table(("images", "shards", "read", "written once", "written after every shard"), rows)


BLOCKS = {
    "measured": measured_table,
    "inputs": inputs_table,
    "storage": storage_table,
    "extraction": extraction_table,
    "training": training_table,
    "money": money_table,
    "memory": memory_table,
    "manifest": manifest_table,
}


def with_tables(text, inputs):
    """Return the page's text with its tables."""
    for name, make in BLOCKS.items():
        found = re.findall(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", text, re.DOTALL)
        assert len(found) == 1, f"the page has no block {name}"
        text = text.replace(f"<!-- {name} -->\n{found[0]}", f"<!-- {name} -->\n{make(inputs)}")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Inputs):
        several = {"nargs": "+", "type": int} if isinstance(field.default, tuple) else {"type": type(field.default)}
        parser.add_argument(f"--{field.name}", help=f"{NOTES.get(field.name, '')} ({field.default})", **several)
    given = {name: found for name, found in vars(parser.parse_args()).items() if found is not None}
    if not given:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), Inputs()), encoding="utf-8")
        return
    inputs = replace(Inputs(), **given)
    for name, make in BLOCKS.items():
        print(f"{name}\n\n{make(inputs)}")


if __name__ == "__main__":
    main()
