"""Measure how long training waits for a cache at a URL: a real HTTP server and a real S3 server with added latency.

    python tests/benchmarks/remote_read.py --folder /some/disk/with/2GB
    pip install localbucket && python tests/benchmarks/remote_read.py --s3_server localbucket

Servers run in processes of their own on this machine. The loader is the one of training. A step is a pause of the
length in which one rank reads its batch at --mb_per_s, as a GPU leaves the CPU free. *Wait* is the share of the time in
which a step has no batch, without the first batch, whose seconds are shown; *over local* is its difference to the mean
of the local disk before and after. *CPU* is the time of this process and of the servers for each row: moto reads a
complete object for each range of it, so its shards are small; localbucket reads the range. *Faults* drop, refuse with
503, truncate or change one in a hundred answers each, and never answer one in five hundred. The last line is one JSON
object. Needs pip install -e '.[test]'.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from llava_twophase import CacheWriter, FeatureCache  # noqa: E402
from llava_twophase.cache.staging import Stage  # noqa: E402
from llava_twophase.train.data.prefetch import PrefetchDataset  # noqa: E402

SHAPE = (576, 1024)
ROW = SHAPE[0] * SHAPE[1] * 2
TICK = os.sysconf("SC_CLK_TCK")
FAULT = 0.01


def serve(kind, target, latency, fault, urls):
    """Serve a folder, a proxy of an S3 server or the S3 server itself, until the process is ended."""
    from remote_servers import FolderServer, Proxy, s3_server

    if kind == "s3":
        with s3_server() as url:
            urls.put(url)
            threading.Event().wait()
    server = FolderServer(target) if kind == "http" else Proxy(target)
    server.faults.latency = latency
    for name in server.faults.injected:
        setattr(server.faults, name, fault / 5 if name == "stall" else fault)
    urls.put(server.url)
    threading.Event().wait()


class Server:
    """A server in a process of its own, as a context manager that gives its URL."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")
        self._urls = context.Queue()
        self._process = context.Process(target=serve, args=(*arguments, self._urls), daemon=True)

    def __enter__(self):
        self._process.start()
        self.pid = self._process.pid
        return self._urls.get(timeout=120)

    def __exit__(self, *_):
        self._process.kill()
        self._process.join()


class LocalBucket:
    """localbucket's S3 server of a folder, as a context manager that gives its URL."""

    def __init__(self, folder):
        self._folder = folder

    def __enter__(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self._folder.mkdir()
        command = ["localbucket", "--port", str(port), str(self._folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.pid = self._process.pid
        time.sleep(3)
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()


def cpu_seconds(pids):
    """Return the CPU time of processes."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(part[11]) + int(part[12]) for part in fields) / TICK


def make_cache(folder, images, rows_of_a_shard):
    """Write a cache of random bits; the time to read does not depend on the values."""
    rng = np.random.default_rng(0)
    with CacheWriter(folder, SHAPE, "bfloat16", {"made": "remote_read.py"}, images_per_shard=rows_of_a_shard) as cache:
        for row in range(images):
            bits = rng.integers(0, 0x7F00, SHAPE, np.uint16)
            cache.add(f"{row:06d}.jpg", (bits.astype(np.uint32) << 16).view(np.float32))


def upload(folder, url, endpoint):
    import fsspec

    os.environ.update(AWS_ENDPOINT_URL=endpoint, AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
    os.environ.update(AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true")
    files, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    files.mkdir(path.partition("/")[0])
    files.put(f"{folder}/", path, recursive=True)


def positions(samples):
    return {"position_in_batch": torch.stack([sample["position_in_batch"] for sample in samples])}


def measure(path, args, *servers, stage=None):
    """Return what one epoch in random order waits for, and the CPU time that it takes."""
    started = time.perf_counter()
    cache = FeatureCache(path, stage=stage)
    opened = time.perf_counter() - started
    order = np.random.default_rng(1).permutation(len(cache)).tolist()
    dataset = PrefetchDataset(lambda index: {}, positions, cache, list(cache.keys()), args.batch)
    loader = DataLoader(dataset, args.batch, sampler=order, collate_fn=lambda pending: pending, drop_last=True)
    if cache.is_remote:
        dataset.announce(order, 0, 1)
    step = args.batch * ROW / (args.mb_per_s * 1e6)
    batches = iter(Accelerator(cpu=True).prepare(loader))
    started = time.perf_counter()
    next(batches)
    first = time.perf_counter() - started
    waited, steps = 0.0, 0
    pids = [server.pid for server in servers]
    own, theirs = time.process_time(), cpu_seconds(pids)
    while True:
        time.sleep(step)
        asked = time.perf_counter()
        if next(batches, None) is None:
            break
        waited += time.perf_counter() - asked
        steps += 1
    seconds = steps * step + waited
    cache.close()
    return {
        "open_s": round(opened, 2),
        "first_batch_s": round(first, 2),
        "steps": steps,
        "mb_per_s": round(steps * args.batch * ROW / seconds / 1e6, 1),
        "data_wait_percent": round(100 * waited / seconds, 2),
        "own_cpu_ms_per_row": round(1e3 * (time.process_time() - own) / (steps * args.batch), 1),
        "server_cpu_ms_per_row": round(1e3 * (cpu_seconds(pids) - theirs) / (steps * args.batch), 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder for the data (default: a temporary folder)")
    parser.add_argument("--images", type=int, default=416, help="rows of 1.18 MB (default: 416)")
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch (default: 16)")
    parser.add_argument("--s3_server", choices=["moto", "localbucket"], default="moto", help="default: moto")
    parser.add_argument("--rows_of_a_shard", type=int, help="default: 8 for moto, 32 for localbucket")
    parser.add_argument(
        "--mb_per_s", type=float, default=25.0, help="what a rank reads (default: 25; H100: 16 at 13B, 30 at 7B)"
    )
    parser.add_argument("--latency", type=float, default=0.15, help="seconds before each answer (default: 0.15)")
    args = parser.parse_args()
    args.rows_of_a_shard = args.rows_of_a_shard or (8 if args.s3_server == "moto" else 32)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="remote_read-", dir=args.folder))
    try:
        make_cache(folder / "cache", args.images, args.rows_of_a_shard)
        found = measure_all(folder, args)
    finally:
        shutil.rmtree(folder)
    local = (found["local disk"]["data_wait_percent"] + found["local disk, again"]["data_wait_percent"]) / 2
    for values in found.values():
        values["over_local_percent"] = round(values["data_wait_percent"] - local, 2)
    report(found, args)


def measure_all(folder, args):
    """Return the measurements of each way to read."""
    found = {"local disk": measure(folder / "cache", args)}
    for name, fault in (("HTTP", 0.0), ("HTTP, faults", FAULT)):
        with (server := Server("http", str(folder), args.latency, fault)) as url:
            found[name] = measure(f"{url}/cache", args, server)
    s3 = Server("s3", "", 0.0, 0.0) if args.s3_server == "moto" else LocalBucket(folder / "buckets")
    with s3 as endpoint:
        upload(folder / "cache", "s3://bucket/cache", endpoint)
        for name, fault in (("S3", 0.0), ("S3, faults", FAULT)):
            with (proxy := Server("proxy", endpoint, args.latency, fault)) as url:
                os.environ["AWS_ENDPOINT_URL"] = url
                found[name] = measure("s3://bucket/cache", args, s3, proxy)
    with (server := Server("http", str(folder), args.latency, 0.0)) as url:
        stage = Stage(folder / "stage", 10**12)
        for name in ("HTTP, stage filled during the run", "HTTP, stage filled before"):
            found[name] = measure(f"{url}/cache", args, server, stage=stage)
    return {**found, "local disk, again": measure(folder / "cache", args)}


def report(found, args):
    headings = ("opened in s", "first batch s", "MB/s", "wait %", "over local %", "CPU ms", "servers' CPU ms")
    table = Table("cache", *headings, box=None)
    for name, values in found.items():
        cells = ("open_s", "first_batch_s", "mb_per_s", "data_wait_percent", "over_local_percent")
        cells = (*cells, "own_cpu_ms_per_row", "server_cpu_ms_per_row")
        table.add_row(name, *(str(values[cell]) for cell in cells))
    console = Console(width=110)
    load = os.getloadavg()[1]
    console.print(
        f"{platform.platform()}, {os.cpu_count()} cores, load {load:.1f}, latency {args.latency * 1e3:.0f} ms"
    )
    console.print(table)
    print(json.dumps({"arguments": {k: v for k, v in vars(args).items() if k != "folder"}, "results": found}))


if __name__ == "__main__":
    main()
