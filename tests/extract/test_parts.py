"""The pieces: batches halved when memory runs out, stage times, progress without a terminal, and a large second run."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch

from cache.make import make_cache
from llava_twophase.cache.codec import Codec
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.cache.reader import FeatureCache
from llava_twophase.errors import UserError
from llava_twophase.extract import progress
from llava_twophase.extract.encode import Encoder
from llava_twophase.extract.plan import make_plan
from llava_twophase.extract.progress import Progress
from llava_twophase.extract.report import report_twins
from llava_twophase.extract.stage_times import StageTimes


class SmallTower:
    """A tower whose device holds few images at once; its features are the crops' first values."""

    device = torch.device("cpu")

    def __init__(self, limit, error):
        self.limit, self.error, self.batches = limit, error, []

    def encode(self, crops):
        if len(crops) > self.limit:
            raise self.error
        self.batches.append(len(crops))
        return crops[:, :2, :4, 0].float()


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: not enough memory: you tried ..."),
]


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_halves_the_batch_and_goes_on(error, caplog):
    tower, codec = SmallTower(3, error), Codec("float32", (2, 4))
    encoder = Encoder(tower, codec)
    pixels = torch.randint(0, 256, (10, 4, 4, 3), dtype=torch.uint8)
    with caplog.at_level(logging.WARNING):
        rows = encoder(pixels).numpy()
        encoder(pixels)
    np.testing.assert_array_equal(rows, codec.to_rows(pixels[:, :2, :4, 0].float()).numpy())
    assert tower.batches == [2] * 10
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 10 images at once: going on with 5 (--batch_size 5 avoids the attempt)",
        "out of memory with 5 images at once: going on with 2 (--batch_size 2 avoids the attempt)",
    ]


def test_out_of_memory_with_one_image_says_what_to_change():
    with pytest.raises(UserError, match="--compute_dtype bf16"):
        Encoder(SmallTower(0, ERRORS[0]), Codec("float32", (2, 4)))(torch.zeros(4, 4, 4, 3, dtype=torch.uint8))


def test_another_error_is_no_reason_to_halve():
    with pytest.raises(RuntimeError, match="shapes"):
        Encoder(SmallTower(1, RuntimeError("shapes")), Codec("float32", (2, 4)))(
            torch.zeros(4, 4, 4, 3, dtype=torch.uint8)
        )


@pytest.mark.parametrize(
    ("times", "bound"),
    [
        (StageTimes(total=10, starved=1, stalled=1), "tower"),
        (StageTimes(total=10, starved=7, decode=50, read=2), "decode"),
        (StageTimes(total=10, starved=7, decode=2, read=50), "read"),
        (StageTimes(total=10, starved=1, stalled=6), "disk"),
    ],
)
def test_bound_by(times, bound):
    assert times.bound_by() == bound
    assert f"bound by: {bound}; " in times.describe()


def test_lines_instead_of_a_bar_where_there_is_no_terminal(caplog, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with caplog.at_level(logging.INFO), Progress(1000, 10**9) as shown:
        shown.show(Counter(images=250, quarantined=1))
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("250 of 1000 images, ") and "249.00 GB, 1 quarantined" in line and " left, " in line


def test_pictures_under_one_name_each_are_not_reported(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache")
    assert report_twins(FeatureCache(cache)) is None


def test_a_plan_does_not_depend_on_what_was_sealed(tmp_path):
    """Planned again after any shard was sealed, the rest of the plan is the rest, and its digest the same."""
    cache, keys, _ = make_cache(tmp_path / "cache", counts=(4, 4, 4))
    manifest = read_manifest(cache)
    fresh = make_plan(tmp_path / "nothing", None, keys, 4, lambda entries: set())
    manifest.plan, manifest.complete, manifest.shards = {"first_shard": 0, "digest": fresh.digest}, False, []
    for number in (1, 0, 2):
        (cache / "shards" / f"shard-00000{number}.h5").unlink()
        manifest.shards = [entry for entry in manifest.shards if str(number) not in entry.file]
        plan = make_plan(cache, manifest, keys, 4, lambda entries: set())
        assert plan.goes_on and plan.digest == fresh.digest
        gone = {shard.number for shard in plan.work}
        assert number in gone and [shard.keys for shard in plan.work] == [fresh.work[n].keys for n in sorted(gone)]


def test_another_shard_size_leaves_sealed_shards_alone(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache", counts=(4, 4))
    more = [*keys, *(f"new/{row}.jpg" for row in range(5))]
    plan = make_plan(cache, read_manifest(cache), more, 2, lambda entries: set())
    assert not plan.goes_on and plan.cached == 8
    assert [(shard.number, len(shard.keys)) for shard in plan.work] == [(2, 2), (3, 2), (4, 1)]
