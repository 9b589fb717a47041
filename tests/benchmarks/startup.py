"""Measure a training command from its start to its second step: seconds and memory of each rank, by number of records.

    python tests/benchmarks/startup.py --folder /some/disk/with/12GB
    python tests/benchmarks/startup.py --records 558128 --ranks 1

Records look like LLaVA-Pretrain's. The cache has all keys and holes in place of features; the LLM is tiny. Everything
else is what a run does: the real command, every check, and the sample order. The first start reads the data file entry
by entry and keeps its columns; later ones map them. The last line is one JSON object.

Private memory is what a rank has for itself, and peaks are sampled. Shared memory is mapped files, which the kernel
counts for each process that has touched them; the proportional size (PSS) divides them by these processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import numpy as np  # noqa: E402
import xxhash  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from commands import torchrun, train_command  # noqa: E402
from llava_twophase.cache.format import SHARDS, shard_name  # noqa: E402
from llava_twophase.cache.manifest import Manifest  # noqa: E402
from llava_twophase.cache.session import CacheSession  # noqa: E402
from llava_twophase.cache.shard_writer import ShardSpec, ShardWriter  # noqa: E402

PER_SHARD = 1024
CAPTIONS = 20_000  # different ones, before their number
FINGERPRINT = {"tower": "startup.py"}
SHAPE = (16, 32)
PROMPTS = (
    "Render a clear and concise summary of the photo.\n<image>",
    "<image>\nWrite a terse but informative summary of the picture.",
    "<image>\nGive a brief description of the image.",
    "Describe the image concisely.\n<image>",
)
PLACE = "LLAVA_STARTUP_RESULTS"
SAMPLED_EVERY = 0.2


def key_of(row):
    return f"{row // 1000:05d}/{row:09d}.jpg"


def captions(count):
    """Return captions of 5 to 14 invented words; one in fifty is not ASCII."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(2, 9))) for _ in range(5000)]
    return [" ".join(draw.choices(words, k=draw.randint(5, 14))) + " café" * (row % 50 == 0) for row in range(count)]


def write_records(path, count):
    """Write LLaVA's JSON, in one line as LLaVA-Pretrain's is."""
    prompts, texts = [json.dumps(prompt) for prompt in PROMPTS], captions(CAPTIONS)
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            human = f'{{"from": "human", "value": {prompts[row % 4]}}}'
            gpt = f'{{"from": "gpt", "value": "{texts[row % CAPTIONS]} {row}"}}'
            record = f'{{"id": "{row:09d}", "image": "{key_of(row)}", "conversations": [{human}, {gpt}]}}'
            file.write(f"{', ' if row else '['}{record}")
        file.write("]")


def write_cache(folder, images):
    """Write a cache whose features are zeros that take no disk space."""
    (folder / SHARDS).mkdir(parents=True)
    spec, entries = ShardSpec(SHAPE, "bfloat16", FINGERPRINT, {"made": "startup.py"}), []
    zeros = xxhash.xxh3_64_intdigest(bytes(spec.row_bytes))
    for number, first in enumerate(range(0, images, PER_SHARD)):
        keys = [key_of(row) for row in range(first, min(first + PER_SHARD, images))]
        writer = ShardWriter(folder / SHARDS / shard_name(number), keys, spec)
        writer._written = len(keys)
        writer._columns["row_xxh3"][:] = np.uint64(zeros)
        entries.append(writer.seal())
    with CacheSession(folder) as session:
        session.replace(Manifest(FINGERPRINT, {}, PER_SHARD, True, shards=entries))


def memory(process="self"):
    """Return a process's memory in MB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return {
        "private_mb": kilobytes["Anonymous"] * 1024 / 1e6,
        "unshared_mb": private * 1024 / 1e6,
        "pss_mb": kilobytes["Pss"] * 1024 / 1e6,
        "rss_mb": kilobytes["Rss"] * 1024 / 1e6,
    }


def run_rank(folder):
    """Run the training command of this process's arguments, and write what it needed until its first two steps."""
    from llava_twophase.train.cli import main
    from llava_twophase.train.loop.trainer import ProjectorTrainer

    found, started, peaks, done = {}, float(os.environ["LLAVA_STARTUP_BEGIN"]), {}, threading.Event()

    def sample():
        while not done.wait(SAMPLED_EVERY):
            for name, value in memory().items():
                peaks[name] = max(peaks.get(name, 0.0), value)

    step = ProjectorTrainer.training_step

    def measured(self, *args, **kwargs):
        name = ("first_step", "second_step")[min(len(found), 1)]
        found.setdefault(name, {"wall_s": time.time() - started, "cpu_s": time.process_time(), **memory()})
        return step(self, *args, **kwargs)

    threading.Thread(target=sample, daemon=True).start()
    with mock.patch.object(ProjectorTrainer, "training_step", measured):
        code = main()
    done.set()
    result = {**found, "peak": peaks}
    (Path(folder) / f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(result), encoding="utf-8")
    return code


def start(inputs, folder, ranks, home):
    """Start the command and return what each rank measured."""
    results = Path(tempfile.mkdtemp(dir=folder))
    command = train_command(
        **inputs, output_dir=results / "out", max_steps=2, per_device_train_batch_size=32, num_train_epochs=1
    )[1:]
    launcher = [sys.executable, *(["-m", "torch.distributed.run", *torchrun(ranks)[1:]] if ranks > 1 else [])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(TESTS.parent),
        PLACE: str(results),
        "LLAVA_STARTUP_BEGIN": repr(time.time()),
    }
    subprocess.run([*launcher, __file__, *command], env=environment, check=True, stdout=sys.stderr)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("rank-*.json"))]
    shutil.rmtree(results)
    return found


def largest(found, part, name):
    return round(max(rank[part][name] for rank in found), 1)


def summarize(found):
    """Return the largest values over the ranks."""
    return {
        "wall_s_to_first_step": largest(found, "first_step", "wall_s"),
        "wall_s_to_second_step": largest(found, "second_step", "wall_s"),
        "cpu_s_to_first_step": largest(found, "first_step", "cpu_s"),
        "cpu_s_to_second_step": largest(found, "second_step", "cpu_s"),
        "peak_private_mb": largest(found, "peak", "private_mb"),
        "peak_pss_mb": largest(found, "peak", "pss_mb"),
        "peak_rss_mb": largest(found, "peak", "rss_mb"),
        "private_mb_at_second_step": largest(found, "second_step", "private_mb"),
        "pss_mb_at_second_step": largest(found, "second_step", "pss_mb"),
    }


def make_inputs(folder, count):
    """Write the records and the cache unless they are there, and return the flags that give them."""
    data, cache = folder / f"{count}.json", folder / f"cache-{count}"
    if not data.exists():
        print(f"making {count} records", file=sys.stderr)
        write_records(data.with_suffix(".tmp"), count)
        data.with_suffix(".tmp").rename(data)
    if not (cache / "manifest.json").exists():
        print(f"making a cache of {count} images", file=sys.stderr)
        shutil.rmtree(cache, ignore_errors=True)
        with mock.patch("os.fsync"):  # nothing here has to survive a power failure
            write_cache(cache, count)
    return {"data_path": data, "feature_cache": cache, "vision_tower": "startup.py"}


def measure(folder, count, ranks):
    """Return what a first start needs, and what later starts with each number of ranks do."""
    inputs = {"model_name_or_path": folder / "llm", **make_inputs(folder, count)}
    home = Path(tempfile.mkdtemp(dir=folder))
    try:
        found = {f"first, {ranks[0]} ranks": summarize(start(inputs, folder, ranks[0], home))}
        found |= {f"later, {number} ranks": summarize(start(inputs, folder, number, home)) for number in ranks}
        sizes = {part: sum(path.stat().st_size for path in home.rglob(f"{part}/*")) for part in ("records", "keys")}
    finally:
        shutil.rmtree(home)
    kept = {f"kept_{part}_mb": round(size / 1e6, 1) for part, size in sizes.items()}
    return {"starts": found, **kept, "data_mb": round(inputs["data_path"].stat().st_size / 1e6, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder for the inputs, which stay there (default: a temporary folder)")
    parser.add_argument("--records", nargs="+", type=int, default=[558_128, 12_000_000])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    from tiny import write_llama

    folder, line = Path(args.folder or tempfile.mkdtemp(prefix="startup-")), {}
    table = Table("records", "start", "wall s", "CPU s", "private MB", "PSS MB", "RSS MB")
    columns = ("wall_s_to_second_step", "cpu_s_to_second_step", "peak_private_mb", "peak_pss_mb", "peak_rss_mb")
    try:
        folder.mkdir(exist_ok=True)
        write_llama(folder / "llm", captions(200))
        for count in args.records:
            found = line[f"{count} records"] = measure(folder, count, args.ranks)
            for name, values in found["starts"].items():
                table.add_row(f"{count:,}", name, *(str(values[column]) for column in columns))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    Console(width=120).print(table)
    print(json.dumps({**line, "load": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    sys.exit(run_rank(os.environ[PLACE]) if PLACE in os.environ else main())
