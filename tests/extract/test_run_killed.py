"""An extraction that is killed at any moment and run again gives the bytes of an uninterrupted one.

No sealed shard is written again. `LLAVA_TWOPHASE_KILLS=100` sets the number of kills of the random test.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter

import pytest

from extract.server import files
from helpers import free_port
from llava_twophase.cache.check.verify import verify

KILLS = int(os.environ.get("LLAVA_TWOPHASE_KILLS", "12"))


@pytest.fixture
def broken(image_set, tmp_path):
    """A copy of the image folder with three bad pictures, two of them in one shard."""
    folder = shutil.copytree(image_set.folder, tmp_path / "images")
    for key in (image_set.keys[3], image_set.keys[17], image_set.keys[19]):
        (folder / key).write_bytes(b"<html>")
    return folder


@pytest.fixture
def skipping(command, broken, tmp_path):
    """The command that skips them, into the given cache."""
    return lambda cache: command(feature_cache=tmp_path / cache, image_folder=broken, on_bad_image="skip")


def sealed(cache):
    return {path.name: path.stat().st_mtime_ns for path in (cache / "shards").glob("*.h5")} if cache.exists() else {}


def assert_kept(before, cache):
    now = sealed(cache)
    assert {name: now.get(name) for name in before} == before


def test_killed_before_every_durable_step_and_run_again_gives_the_same_bytes(server, skipping, tmp_path):
    server.run(skipping("uninterrupted"), COUNT_STEPS=tmp_path / "steps")
    wanted, steps = files(tmp_path / "uninterrupted"), (tmp_path / "steps").read_text(encoding="utf-8").split()
    assert {"pwrite", "fsync", "replace", "unlink"} <= Counter(steps).keys()
    # Writes of rows are many and alike; every other kind of step is tried at each place.
    writes = [number for number, name in enumerate(steps, 1) if name == "pwrite"]
    others = [number for number, name in enumerate(steps, 1) if name != "pwrite"]
    tried = sorted([*others, *writes[:: max(1, len(writes) // 4)]])
    killed = 0
    for number in tried:
        cache = tmp_path / f"killed-{number}"
        first = server.start(skipping(cache.name), crash_at=number)
        # Threads share the steps: the manifest is written a few times more or less, and a run may have fewer of them.
        assert first.wait() in (-signal.SIGKILL, 0), first.log()
        killed += first.code != 0
        before = sealed(cache)
        server.run(skipping(cache.name))
        assert_kept(before, cache)
        assert files(cache) == wanted, f"killed before step {number} ({steps[number - 1]})"
        shutil.rmtree(cache)
    assert killed > 0.8 * len(tried)


def test_killed_at_random_moments_until_complete_gives_the_same_bytes(server, skipping, tmp_path):
    """One cache, killed and resumed until it is complete, with worker processes; then the next one."""
    server.run(skipping("uninterrupted"))
    wanted, chance = files(tmp_path / "uninterrupted"), random.Random(0)
    kills = round_number = 0
    while kills < KILLS:
        round_number += 1
        cache = tmp_path / f"round-{round_number}"
        while True:
            before = sealed(cache)
            run = server.start([*skipping(cache.name), "--num_workers", str(chance.choice((0, 1, 2)))])
            time.sleep(chance.uniform(0, 0.6))
            if kills < KILLS:
                run.kill()
            if run.wait() == 0:
                break
            assert run.code == -signal.SIGKILL, run.log()
            kills += 1
            assert_kept(before, cache)
        assert files(cache) == wanted
        shutil.rmtree(cache)


def test_two_ranks_of_which_one_or_both_are_killed_give_the_same_bytes(server, skipping, tmp_path):
    server.run(skipping("uninterrupted"))
    wanted, chance = files(tmp_path / "uninterrupted"), random.Random(1)
    cache = tmp_path / "ranks"
    for attempt in range(100):
        before = sealed(cache)
        port = free_port()
        runs = [
            server.start(
                skipping("ranks"), RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            )
            for rank in range(2)
        ]
        if attempt < max(2, KILLS // 4):
            time.sleep(chance.uniform(0.2, 1.2))
            for run in runs if attempt % 2 else [chance.choice(runs)]:
                run.kill()
            time.sleep(0.5)
            for run in runs:  # what the launcher does when one of its processes dies
                run.kill(signal.SIGTERM)
        codes = [run.wait() for run in runs]
        assert_kept(before, cache)
        if codes == [0, 0]:
            break
    assert files(cache) == wanted
    assert verify(cache) == []


def test_a_run_resumed_with_other_ranks_and_workers_gives_the_same_bytes(server, skipping, tmp_path):
    server.run(skipping("uninterrupted"))
    wanted = files(tmp_path / "uninterrupted")
    steps = tmp_path / "steps"
    server.run(skipping("counted"), COUNT_STEPS=steps)
    half = len(steps.read_text(encoding="utf-8").split()) // 2
    server.run(skipping("interrupted"), expect=-signal.SIGKILL, crash_at=half)
    port = free_port()
    common = {"WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = [
        server.start([*skipping("interrupted"), "--num_workers", "1"], RANK=rank, LOCAL_RANK=rank, **common)
        for rank in range(3)
    ]
    assert [run.wait() for run in runs] == [0, 0, 0], "\n".join(run.log() for run in runs)
    assert files(tmp_path / "interrupted") == wanted


def test_control_c_says_how_to_resume(server, command, expected_files, tmp_path):
    run = server.start(command(batch_size=1, num_workers=1))
    while len(sealed(tmp_path / "cache")) < 1:
        time.sleep(0.01)
    run.kill(signal.SIGINT)
    assert run.wait() == 130
    assert "run the same command again to resume" in run.log() and "Traceback" not in run.log()
    server.run(command())
    assert sorted(files(tmp_path / "cache")) == sorted(expected_files)


def test_sigterm_keeps_finished_shards_and_says_how_to_resume(server, command, expected_files, tmp_path):
    run = server.start(command(batch_size=1))
    while len(sealed(tmp_path / "cache")) < 1:
        time.sleep(0.01)
    kept = sealed(tmp_path / "cache")
    run.kill(signal.SIGTERM)
    assert run.wait() == 143
    assert run.log().count("received SIGTERM: interrupted") == 1 and "Traceback" not in run.log()
    assert_kept(kept, tmp_path / "cache")
    server.run(command())
    assert sorted(files(tmp_path / "cache")) == sorted(expected_files)
