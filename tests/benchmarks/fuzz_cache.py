"""Run verify and the reader on mutated caches: neither crashes, hangs, or accepts wrong data.

    python tests/benchmarks/fuzz_cache.py --mutations 100000

A mutant is a cache with a changed manifest, a changed shard, or a shard that was changed and then sealed again with
new checksums. A mutant that `verify` accepts must have the keys and rows of the original. The last line is one JSON
object.
"""

import argparse
import faulthandler
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cache.make import make_cache, reseal
from llava_twophase.cache.check import hdf5_process as hdf5
from llava_twophase.cache.check.verify import verify
from llava_twophase.cache.format import MANIFEST, SHARDS, USER_BLOCK, shard_name
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.errors import UserError

STORAGES = ("bfloat16", "int8", "int4")
HANG_SECONDS = 60
VALUES = (
    -1, 0, 1, 2, 5, 255, 1 << 31, 1 << 61, 1 << 62, 1 << 64, 10**400, 1.5, True, None, "", "/etc/passwd", "../x",
    "shard-000000.h5", "bfloat16", "int4", "\ud800", [], {}, [[]], {"": {}}, [1] * 9, float("nan"),
)  # fmt: skip


class Original:
    """An intact cache, and the content of its files."""

    def __init__(self, folder, storage):
        path, keys, rows = make_cache(folder, counts=(5, 3), dtype=storage, shape=(4, 32))
        self.path = path
        self.keys = keys
        self.rows = rows
        self.manifest, self.shard = self.path / MANIFEST, self.path / SHARDS / shard_name(0)
        self._bytes = {path: path.read_bytes() for path in (self.manifest, self.shard)}
        shard = self._bytes[self.shard]
        # Most of a shard is padding; changes to other bytes find more.
        self.used = [place for place in range(USER_BLOCK, len(shard)) if shard[place]]

    def restore(self):
        for path, data in self._bytes.items():
            path.write_bytes(data)

    def mutate(self, kind, chance):
        """Change a file, and repeat until its bytes differ."""
        while all(path.read_bytes() == data for path, data in self._bytes.items()):
            MUTATIONS[kind](self, chance)

    def unchanged(self):
        """Return whether the cache still has the keys and rows of the original."""
        cache = FeatureCache(self.path)
        return list(cache.keys()) == self.keys and np.array_equal(cache.read_raw(self.keys), self.rows)


def mutate_bytes(path, chance, start=0):
    """Overwrite, delete or insert bytes, or truncate the file."""
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        place = chance.randrange(min(start, len(data)), max(len(data), start + 1))
        length = chance.choice((0, 1, 1, 1, 2, 8))
        new = bytes(chance.choices(b'0-19"{}[],:\0\xff\x01\x80e.', k=chance.choice((length, length, 0, 1, 9))))
        data[place : place + length] = new
        if chance.random() < 0.02:
            del data[place:]
    path.write_bytes(data)


def mutate_json(content, chance):
    """Change one value at a random place of a JSON document."""
    inner = content
    while True:
        places = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not places:
            return
        place = chance.choice(places)
        if isinstance(inner[place], (dict, list)) and inner[place] and chance.random() < 0.8:
            inner = inner[place]
            continue
        action = chance.randrange(8)
        if action == 0:
            del inner[place]
        elif action == 1 and isinstance(inner, list):
            inner.append(inner[place])
        elif action == 2 and isinstance(inner[place], int):
            inner[place] += chance.choice((-1, 1, 8, 4096, -4096))
        else:
            inner[place] = chance.choice(VALUES)
        return


def mutate_manifest(original, chance):
    if chance.random() < 0.4:
        mutate_bytes(original.manifest, chance)
        return
    content = json.loads(original.manifest.read_text(encoding="utf-8"))
    for _ in range(chance.choice((1, 1, 2))):
        mutate_json(content, chance)
    original.manifest.write_text(json.dumps(content), encoding="utf-8")


def mutate_shard(original, chance):
    mutate_bytes(original.shard, chance, start=0 if chance.random() < 0.5 else USER_BLOCK)


def mutate_header(original, chance):
    data = original.shard.read_bytes()
    content = json.loads(data[:USER_BLOCK])
    mutate_json(content, chance)
    line = json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")
    original.shard.write_bytes(line[: USER_BLOCK - 1].ljust(USER_BLOCK - 1) + b"\n" + data[USER_BLOCK:])


def mutate_sealed(original, chance):
    def edit(data, header):
        for _ in range(chance.choice((1, 1, 2, 4))):
            near = chance.choice(original.used) + chance.choice((0, 0, 0, 1, -1, 7))
            place = min(near if chance.random() < 0.8 else chance.randrange(USER_BLOCK, len(data)), len(data) - 1)
            data[place] = chance.choice((0, 255, data[place] ^ (1 << chance.randrange(8)), chance.randrange(256)))

    reseal(original.path, 0, edit)


MUTATIONS = {
    "manifest": mutate_manifest,
    "shard": mutate_shard,
    "header": mutate_header,
    "sealed": mutate_sealed,
}


def fuzz(folder, mutations, seed, checker):
    """Try mutants, assert that none is wrong, and return the number of each kind that was refused or accepted."""
    chance = random.Random(seed)
    originals = [Original(Path(folder) / storage, storage) for storage in STORAGES]
    found = Counter()
    for number in tqdm(range(mutations), desc="mutants", disable=None):
        original, kind = chance.choice(originals), chance.choice(list(MUTATIONS))
        original.mutate(kind, chance)
        name = f"seed {seed}, mutant {number}: {kind} of {original.path.name}"
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        problems = verify(original.path, checker)
        try:
            unchanged = original.unchanged()
        except UserError as error:
            unchanged = f"refused: {error}"
        accepted = all(problem.note for problem in problems)
        assert not accepted or unchanged is True, f"{name}: verify accepts it, reading gives {unchanged}"
        found[f"{kind}_{'accepted' if accepted else 'refused'}"] += 1
        found["hdf5_crashed"] += any("HDF5 crashes" in problem.what for problem in problems)
        found["hdf5_hung"] += any("HDF5 hangs" in problem.what for problem in problems)
        original.restore()
    faulthandler.cancel_dump_traceback_later()
    return dict(sorted(found.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    faulthandler.enable()
    hdf5.SECONDS = 4.0  # crafted metadata can make libhdf5 loop forever; verify then stops it
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, hdf5.Hdf5Checker() as checker:
        found = fuzz(folder, args.mutations, args.seed, checker)
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"mutations": args.mutations, "seed": args.seed, "seconds": seconds, **found}))


if __name__ == "__main__":
    main()
