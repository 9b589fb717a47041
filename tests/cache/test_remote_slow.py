"""Caches read over slow links, with a simulated clock: requests are not given up while the link works."""

import numpy as np
import pytest

from cache.slow_link import SlowLink
from llava_twophase.cache.format import SHARDS, USER_BLOCK, shard_name
from llava_twophase.cache.remote import RemoteStorage
from llava_twophase.errors import UserError

NAME = shard_name(0)
MIB = 1 << 20


@pytest.fixture
def content(tmp_path):
    """Random bytes of a file that can be opened as a shard."""
    (tmp_path / SHARDS).mkdir()
    data = np.random.default_rng(0).bytes(32 * MIB)
    (tmp_path / SHARDS / NAME).write_bytes(data)
    return data


def read(storage, shard, count, size):
    """Read pieces together."""
    buffer = bytearray(count * size)
    view = memoryview(buffer)
    storage.read_together([(shard, view[start : start + size], start) for start in range(0, len(buffer), size)])
    return bytes(buffer)


@pytest.mark.parametrize(("requests", "size", "rate"), [(8, 4 * MIB, 0.3e6), (32, MIB, 0.5e6), (32, MIB, 0.15e6)])
def test_rows_are_read_over_a_slow_link(content, tmp_path, monkeypatch, requests, size, rate):
    storage = RemoteStorage(f"file://{tmp_path}", requests)
    shard = storage.open_shard(NAME)
    link = SlowLink(monkeypatch, rate, requests)
    assert read(storage, shard, requests, size) == content[: requests * size]
    assert max(link.attempts.values()) <= 3


def test_rows_at_1_mb_per_second_are_requested_once(content, tmp_path, monkeypatch):
    storage = RemoteStorage(f"file://{tmp_path}", 8)
    shard = storage.open_shard(NAME)
    link = SlowLink(monkeypatch, 1e6, 8)
    assert read(storage, shard, 8, 4 * MIB) == content
    assert set(link.attempts.values()) == {1}


def test_a_cache_is_opened_at_150_kb_per_second(content, tmp_path, monkeypatch):
    storage = RemoteStorage(f"file://{tmp_path}")
    SlowLink(monkeypatch, 0.15e6, 32)
    storage.will_open([NAME])
    shard = storage.open_shard(NAME)
    head = bytearray(USER_BLOCK)
    shard.read_into(memoryview(head), 0)
    assert head == content[:USER_BLOCK]


def test_a_link_without_any_progress_is_an_error(content, tmp_path, monkeypatch):
    storage = RemoteStorage(f"file://{tmp_path}")
    shard = storage.open_shard(NAME)
    link = SlowLink(monkeypatch, 1.0, 32)
    with pytest.raises(UserError, match="cannot be read"):
        read(storage, shard, 1, MIB)
    assert sum(link.attempts.values()) <= 3
