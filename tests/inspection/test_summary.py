"""``summary``: its JSON values, its sentences, and what a cache does not record."""

import json

import h5py
import numpy as np
import pytest

from cache.make import STORAGES, fingerprint_of, make_cache
from inspection.command import inspect
from llava_twophase import CacheWriter
from llava_twophase.cache.format import SHARDS


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")[0]


@pytest.mark.parametrize("dtype", STORAGES)
def test_summary_as_json(dtype, tmp_path):
    cache, _, stored = make_cache(tmp_path / "cache", dtype=dtype)
    result = inspect("summary", cache, "--json")
    values = json.loads(result.stdout)
    assert len(result.stdout.splitlines()) == 1
    expected = {
        "schema": 1,
        "complete": True,
        "images": 8,
        "shards": 2,
        "bytes": sum(path.stat().st_size for path in (cache / SHARDS).iterdir()),
        "bytes_per_image": stored[0].nbytes,
        "storage_dtype": dtype,
        "tokens": 9,
        "width": 32,
        "quarantined": 0,
        "fingerprint": fingerprint_of(dtype),
    }
    assert {name: values[name] for name in expected} == expected
    assert values["made_by"].startswith("A CLIP tower of 4 layers saw the centre square")
    assert values["of_bfloat16"] == pytest.approx(stored[0].nbytes / (2 * 9 * 32), abs=1e-4)


@pytest.mark.parametrize(("created", "text"), [("2020-01-01T00:00:00+00:00", " days"), ("never", "less than a minute")])
def test_summary_gives_the_age(created, text, cache):
    manifest = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    manifest["provenance"]["created"] = created
    (cache / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (line,) = [line for line in inspect("summary", cache).stdout.splitlines() if line.startswith("  age ")]
    assert line.endswith(text)


def test_summary_gives_the_size_relative_to_bfloat16(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache", dtype="int8")
    assert "int8 with scales, 53% of bfloat16's size" in inspect("summary", cache).stdout


def test_summary_as_text(cache):
    text = inspect("summary", cache).stdout
    for part in ("without the CLS token", "9 tokens x 32, bfloat16", "the tower's values bit for bit", "fingerprint"):
        assert part in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\x1b" not in text


def test_summary_counts_the_quarantine(cache):
    line = json.dumps({"key": "x.jpg", "reason": "empty", "source_size": 0, "source_sha256": None})
    (cache / "quarantine.jsonl").write_text(f"{line}\n", encoding="utf-8")
    assert json.loads(inspect("summary", cache, "--json").stdout)["quarantined"] == 1


def test_summary_reports_an_incomplete_cache(tmp_path):
    cache, _, _ = make_cache(tmp_path / "cache", complete=False)
    assert "INCOMPLETE" in inspect("summary", cache).stdout
    assert json.loads(inspect("summary", cache, "--json").stdout)["complete"] is False


def test_summary_shows_the_software_of_shards_that_were_added_later(tmp_path, monkeypatch):
    def add(*keys):
        with CacheWriter(tmp_path / "cache", (1, 2), "float32", {}, images_per_shard=1) as cache:
            for key in keys:
                cache.add(key, np.ones((1, 2), np.float32))

    add("a.jpg", "b.jpg")
    assert "differs between shards" not in inspect("summary", tmp_path / "cache").stdout
    monkeypatch.setattr("llava_twophase.cache.writer.version", lambda name: "9.9")
    add("a.jpg", "b.jpg", "c.jpg")
    text = " ".join(inspect("summary", tmp_path / "cache").stdout.split())
    assert f"software that differs between shards h5py {h5py.__version__} in 2 shards, 9.9 in 1 shard numpy" in text
    values = json.loads(inspect("summary", tmp_path / "cache", "--json").stdout)
    assert values["shard_software"]["numpy"] == {np.__version__: 2, "9.9": 1}
