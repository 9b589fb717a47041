"""Two ranks of one node that share a stage: each shard is copied once; a kill and a full disk do no harm."""

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from commands import assert_same_outcome, outcome, torchrun, train_command
from helpers import ROOT, process_environment, run
from llava_twophase import CacheWriter, FeatureCache

FILLERS = 150  # further images of a shard, which make it longer than the first request for it


@pytest.fixture(scope="module")
def sharded_cache(plain_cache, tmp_path_factory):
    """The plain scenes in three shards of at least 300 kB: its folder, which is to be served."""
    plain = FeatureCache(plain_cache)
    keys, values = list(plain.keys()), plain.read(list(plain.keys()))
    folder = tmp_path_factory.mktemp("sharded") / "cache"
    writer = CacheWriter(folder, plain.feature_shape, plain.dtype, plain.fingerprint, images_per_shard=4 + FILLERS)
    with writer as cache:
        for position, key in enumerate(keys):
            cache.add(key, values[position])
            if position % 4 == 3:
                for number in range(FILLERS):
                    cache.add(f"filler-{position}-{number}", values[position])
    return folder


@pytest.fixture
def web(sharded_cache):
    from remote_servers import FolderServer

    server = FolderServer(sharded_cache.parent)
    yield server
    server.close()


@pytest.fixture(scope="module")
def command(plain_set, tiny_llama, tiny_clip, tmp_path_factory):
    """Return the training command on two ranks."""
    root = tmp_path_factory.mktemp("runs")

    def make(name, cache, **flags):
        inputs = {"data_path": plain_set.json, "model_name_or_path": tiny_llama, "vision_tower": tiny_clip}
        flags = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "report_to": "none", "use_cpu": True} | flags
        return root / name, torchrun(2) + train_command(**inputs, feature_cache=cache, output_dir=root / name, **flags)

    return make


@pytest.fixture(scope="module")
def local(command, sharded_cache):
    """The outcome of a run from the folder."""
    folder, arguments = command("local", sharded_cache)
    run(arguments, timeout=120)
    return outcome(folder)


def copies_of(web, cache):
    """Return how often each shard was requested completely."""
    sizes = {shard.name: shard.stat().st_size for shard in (cache / "shards").iterdir()}
    return Counter(path.name for path, first, sent in web.ranges_sent if first == 0 and sent == sizes.get(path.name))


def writer_of(part):
    """Return the process that has a file open, None if there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(file) == str(part) for file in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue
    return None


def kill_a_rank_that_copies(stage, launcher):
    """Kill the first rank of a launcher that writes a copy."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert launcher.poll() is None, "the run ended before a copy began"
        for part in stage.glob("*.part"):
            writer = writer_of(part)
            if writer is not None:
                os.kill(writer, signal.SIGKILL)
                return
        time.sleep(0.01)
    raise AssertionError("no copy began")


def test_ranks_that_share_a_stage_copy_each_shard_once_also_after_a_kill(web, command, local, sharded_cache, tmp_path):
    stage = tmp_path / "stage"
    folder, arguments = command("staged", f"{web.url}/cache", stage_dir=stage, stage_gb=1)
    web.faults.latency = 0.3
    launcher = subprocess.Popen(
        list(map(str, arguments)),
        cwd=ROOT,
        env=process_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        kill_a_rank_that_copies(stage, launcher)
        assert launcher.wait(60) != 0
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    done = {copy.name for copy in stage.glob("*.h5")}
    web.faults.latency = 0.0
    web.ranges_sent.clear()

    run(arguments, timeout=120)
    assert_same_outcome(outcome(folder), local)
    assert len(list(stage.glob("*.h5"))) == 3
    assert list(stage.glob("*.part")) == []
    assert sorted(copies_of(web, sharded_cache).values()) == [1] * (3 - len(done))


def test_ranks_that_share_a_full_stage_request_rows_with_one_warning(web, command, local, small_disk):
    stage = small_disk("size=100k")
    folder, arguments = command("full", f"{web.url}/cache", stage_dir=stage, stage_gb=1)
    printed = run(arguments, timeout=120).stderr
    assert printed.count("No space left on device; rows are requested until then: free some space") == 1
    assert_same_outcome(outcome(folder), local)
