"""``compare``: distances by hand, the worst images, other shapes, and codecs."""

import json

import h5py
import numpy as np
import pytest

from cache.make import channels_of, make_cache, make_shard, write
from inspection.command import inspect
from inspection.values import cache_of, random_values
from llava_twophase import CacheWriter
from llava_twophase.cache.format import SHARDS
from llava_twophase.inspection.compare import compare, distance
from llava_twophase.inspection.rows import CheckedRows


def test_compare_of_a_cache_with_itself(tmp_path):
    cache = cache_of(tmp_path / "cache", random_values())
    values = compare(CheckedRows(cache), CheckedRows(cache), 256, 0)
    assert values["fingerprint"] == [] and values["equal_images"] == 20 and values["worst"] == []
    assert values["cosine"] == {"mean": 1.0, "min": 1.0} and values["max_error"] == 0
    assert values["cka"] == pytest.approx(1)


def test_compare_reports_the_worst_images(tmp_path):
    stored = random_values()
    other = stored.copy()
    other[4] *= 1.5
    other[7] *= 1.01
    one = cache_of(tmp_path / "one", other, select_layer=-3)
    two = cache_of(tmp_path / "two", stored)
    result = inspect("compare", one, two, "--json")
    values = json.loads(result.stdout)
    assert [key for key, _, _ in values["worst"]] == ["4.jpg", "7.jpg"]
    assert values["relative_error"]["max"] == pytest.approx(0.5) and values["equal_images"] == 18
    assert values["fingerprint"] == ["select_layer: the first has -3, the second -2"]
    assert "select_layer: the first has -3, the second -2" in inspect("compare", one, two).stdout


def test_compare_of_other_shapes_has_a_cka_only(tmp_path):
    stored = random_values(20, 9, 32)
    rotated = stored @ np.linalg.qr(random_values(1, 32, 32)[0])[0]
    one, two = cache_of(tmp_path / "one", stored), cache_of(tmp_path / "two", rotated[:, :4])
    three = cache_of(tmp_path / "three", rotated)
    values = compare(CheckedRows(one), CheckedRows(two), 256, 0)
    assert "cosine" not in values and values["shapes"] == [[9, 32], [4, 32]]
    assert compare(CheckedRows(one), CheckedRows(three), 256, 0)["cka"] == pytest.approx(1, abs=1e-6)
    assert "errors need equal shapes" in inspect("compare", one, two).stdout


def test_compare_refuses_caches_without_a_common_image(tmp_path):
    one = cache_of(tmp_path / "one", random_values(2))
    two, _, _ = make_cache(tmp_path / "two")
    assert "no image key in common" in inspect("compare", one, two, expect=1).stderr


def test_distance_by_hand():
    one = np.array([[[3.0, 4.0], [0.0, 0.0]]], np.float32)
    found = distance(one, np.array([[[4.0, 3.0], [0.0, 0.0]]], np.float32))
    assert found["cosine"][0] == pytest.approx((24 / 25 + 1) / 2)
    assert found["relative_error"][0] == pytest.approx(2**0.5 / 5) and found["max_error"][0] == 1


def test_int8_is_closer_than_int4(tmp_path):
    torch = pytest.importorskip("torch")
    from llava_twophase.cache.codec import Codec

    values = random_values()
    exact = cache_of(tmp_path / "exact", values)
    errors = {}
    for dtype in ("int8", "int4"):
        stored = Codec(dtype, (9, 32), channels_of(32)).to_rows(torch.from_numpy(values)).numpy()
        (tmp_path / dtype / SHARDS).mkdir(parents=True)
        keys = [f"{row}.jpg" for row in range(20)]
        write(tmp_path / dtype, [make_shard(tmp_path / dtype / SHARDS / "shard-000000.h5", keys, stored, dtype)], dtype)
        errors[dtype] = compare(CheckedRows(tmp_path / dtype), CheckedRows(exact), 256, 0)["relative_error"]["mean"]
    assert 0 < errors["int8"] < 0.02 < errors["int4"] < 0.2


def test_compare_pairs_rows_by_key(tmp_path):
    cache, keys, stored = make_cache(tmp_path / "one", counts=(5,))
    (tmp_path / "two" / SHARDS).mkdir(parents=True)
    entry = make_shard(tmp_path / "two" / SHARDS / "shard-000000.h5", keys[::-1], stored[::-1].copy())
    write(tmp_path / "two", [entry])
    assert compare(CheckedRows(cache), CheckedRows(tmp_path / "two"), 256, 0)["equal_images"] == 5


def test_compare_reports_other_software(tmp_path, monkeypatch):
    def cache(name):
        with CacheWriter(tmp_path / name, (1, 2), "float32", {}) as cache:
            cache.add("a.jpg", np.ones((1, 2), np.float32))
        return tmp_path / name

    one = cache("one")
    assert json.loads(inspect("compare", one, one, "--json").stdout)["software"] == []
    monkeypatch.setattr("llava_twophase.cache.writer.version", lambda name: "9.9")
    text = inspect("compare", one, cache("two")).stdout
    assert f"made with other software:\n  h5py: the first has '{h5py.__version__}', the second '9.9'\n" in text


def test_compare_with_features_that_are_zero_has_no_relative_error(tmp_path):
    one, zero = cache_of(tmp_path / "one", random_values()), cache_of(tmp_path / "zero", random_values() * 0)
    assert json.loads(inspect("compare", one, zero, "--json").stdout)["relative_error"] == {"mean": None, "max": None}
    assert "relative error      inf" in inspect("compare", one, zero).stdout
    assert json.loads(inspect("compare", zero, zero, "--json").stdout)["relative_error"] == {"mean": 0, "max": 0}
