"""Caches at `hf://`, read by huggingface_hub from a stand-in for the Hub: the Hub itself is out of reach for tests."""

import shutil

import numpy as np
import pytest

from cache.make import make_cache, make_shard, rows
from llava_twophase import FeatureCache
from llava_twophase.cache import remote, repetition, time_limits
from llava_twophase.errors import UserError

URL = "hf://datasets/user/features/clip"


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(remote, "OPENING", 1.0)
    monkeypatch.setattr(repetition, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(time_limits, "FIRST", 0.5)
    monkeypatch.setattr("llava_twophase.cache.rows._PAUSE", 0.05)


@pytest.fixture
def made(hub, tmp_path):
    """A cache on the hub: its folder, keys and stored rows."""
    return make_cache(tmp_path / "hub/clip", (6, 6))


def test_hub_cache_gives_the_rows_of_the_local_one_by_ranges(hub, made):
    path, keys, stored = made
    cache = FeatureCache(URL)
    sent = hub.faults.sent
    order = np.random.default_rng(0).permutation(len(keys))
    np.testing.assert_array_equal(cache.read_raw([keys[i] for i in order]), stored[order])
    assert hub.faults.sent - sent == stored.nbytes
    np.testing.assert_array_equal(cache.read(keys), FeatureCache(path).read(keys))


def test_hub_cache_gives_the_rows_under_faults(hub, made):
    _, keys, stored = made
    for name in ("drop", "truncate", "corrupt"):  # the client itself repeats requests after a 503, in seconds
        setattr(hub.faults, name, 0.1)
    cache = FeatureCache(URL)
    for _ in range(3):
        np.testing.assert_array_equal(cache.read_raw(keys), stored)
    assert sum(hub.faults.injected.values()) > 0


def test_a_changed_shard_on_the_hub_is_an_error(hub, made):
    path, keys, _ = made
    cache = FeatureCache(URL)
    make_shard(path / "shards/shard-000000.h5", keys[:6], rows(6, seed=9))
    with pytest.raises(UserError, match=r"shard-000000.h5 changed on the server .*version \w+, now \w+"):
        cache.read_raw(keys)


def test_a_dataset_without_a_cache_is_one_error(hub):
    with pytest.raises(UserError, match=f"{URL} is not a feature cache: it has no manifest.json"):
        FeatureCache(URL)


def test_an_unknown_dataset_is_one_error(hub):
    with pytest.raises(UserError, match=r"hf://datasets/user/other is not a feature cache: it has no manifest.json"):
        FeatureCache("hf://datasets/user/other")


def test_a_private_dataset_needs_a_token(hub, made, monkeypatch):
    hub.token = "hf_secret"
    with pytest.raises(UserError, match="credentials are missing or were refused .*HF_TOKEN or hf auth login"):
        FeatureCache(URL)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    _, keys, stored = made
    np.testing.assert_array_equal(FeatureCache(URL).read_raw(keys), stored)


def test_a_hub_that_cannot_be_reached_is_one_error(hub, made, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"{URL}/manifest.json cannot be read .*check the URL and the network"):
        FeatureCache(URL)


def test_a_shard_that_is_missing_on_the_hub_is_refused(hub, made):
    path, _, _ = made
    (path / "shards/shard-000001.h5").unlink()
    with pytest.raises(UserError, match="shard-000001.h5 does not exist"):
        FeatureCache(URL)
    shutil.rmtree(path)
