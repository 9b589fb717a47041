"""``stats``: numbers compared with numpy over all values, outliers, duplicates, and values that are not finite."""

import json

import numpy as np
import pytest

from cache.make import make_cache, reseal, set_row
from inspection.command import inspect
from inspection.values import cache_of, random_values
from llava_twophase.cache.shard_writer import sha256
from llava_twophase.inspection.rows import CheckedRows
from llava_twophase.inspection.statistics import SampleStatistics


def stats(cache, *flags, expect=0):
    return json.loads(inspect("stats", cache, "--json", *flags, expect=expect).stdout)


def test_statistics_are_those_of_the_values(tmp_path):
    stored = random_values() * 2 + 1
    values = stats(cache_of(tmp_path / "cache", stored))
    norms = np.linalg.norm(stored, axis=-1)
    expected = {
        "mean": stored.mean(dtype=np.float64),
        "std": stored.std(dtype=np.float64),
        "min": stored.min(),
        "max": stored.max(),
        "token_norm": norms.mean(),
        "channel_rms": np.sqrt(np.square(stored, dtype=np.float64).mean((0, 1))),
        "token_norms": norms.mean(0),
        "token_norm_percentiles": np.percentile(norms, (1, 50, 99)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)
    assert (values["rows"], values["of"], values["seed"], values["non_finite"]) == (20, 20, 0, 0)
    assert values["outlier_channels"] == values["dead_channels"] == values["constant_images"] == []


def test_sample_depends_on_the_seed(tmp_path):
    cache = cache_of(tmp_path / "cache", random_values(60))
    first, again, other = (stats(cache, "--n", "10", "--seed", seed) for seed in ("3", "3", "4"))
    assert first == again and first["mean"] != other["mean"] and first["rows"] == 10


def test_outliers_are_reported(tmp_path):
    stored = random_values()
    stored[3, 4] *= 50  # a massive token
    stored[5] = stored[5, :1]  # an image of equal tokens
    stored[6] = 0
    stored[9] = stored[8]
    digests = [sha256(b"%d" % (row if row != 9 else 8)) for row in range(20)]
    values = stats(cache_of(tmp_path / "cache", stored, digests))
    assert values["outlier_token_places"] == [[4, 1]] and values["outlier_token_images"] == 1
    assert values["constant_images"] == ["5.jpg", "6.jpg"]
    assert [pair[:2] for pair in values["nearly_equal_images"]] == [["8.jpg", "9.jpg"]]
    assert (values["equal_pictures_compared"], values["equal_pictures_apart"]) == (1, 0.0)


def test_outlier_channels_are_reported(tmp_path):
    stored = random_values()
    stored[:, :, 7] *= 30
    stored[:, :, 11] = 0.25
    values = stats(cache_of(tmp_path / "cache", stored))
    assert values["dead_channels"] == [11]
    assert [(channel, round(times)) for channel, times in values["outlier_channels"]] == [(7, pytest.approx(30, abs=4))]


def test_duplicate_images_with_different_features_are_measured(tmp_path):
    stored = random_values()
    stored[9] = stored[8]
    stored[9, 0, 0] += 2
    digests = [sha256(b"%d" % (row if row != 9 else 8)) for row in range(20)]
    assert SampleStatistics(CheckedRows(cache_of(tmp_path / "cache", stored, digests)), 256, 0).values()[
        "equal_pictures_apart"
    ] == pytest.approx(2, rel=1e-6)


def test_adjacent_patches_of_smooth_images_have_a_larger_cosine(tmp_path):
    ramp = np.linspace(0, 3, 36).reshape(1, 36, 1)
    stored = np.concatenate([np.cos(ramp), np.sin(ramp), 0 * ramp], axis=-1).repeat(3, axis=0)
    values = SampleStatistics(CheckedRows(cache_of(tmp_path / "cache", stored)), 256, 0).values()
    assert values["adjacent_patch_cosine"] > values["distant_patch_cosine"]


def test_values_that_are_not_finite_exit_with_1(tmp_path):
    # The writer refuses such values; a shard of another program may have them.
    cache, _, stored = make_cache(tmp_path / "cache", dtype="float32")
    bad = stored[2].copy()
    bad[1, :3] = [np.inf, -np.inf, np.nan]
    reseal(cache, 0, lambda data, header: set_row(data, header, 2, bad))
    values = stats(cache, expect=1)
    assert values["non_finite"] == 3 and values["non_finite_images"] == ["00000/éépicture 2.jpg"]
    finite = np.concatenate([stored[:2].ravel(), stored[3:].ravel()])
    assert values["min"] == finite.min() or values["min"] >= stored.min()


def test_statistics_of_one_image_and_one_token(tmp_path):
    values = stats(cache_of(tmp_path / "cache", random_values(1, 1, 32)))
    assert values["nearest_image_cosine"] is None and values["adjacent_patch_cosine"] is None
    assert "images" in inspect("stats", tmp_path / "cache").stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_statistics_of_every_storage_dtype(dtype, tmp_path):
    assert stats(make_cache(tmp_path / "cache", dtype=dtype)[0])["rows"] == 8


def test_neighbours_of_a_large_sample_are_found_in_blocks(tmp_path, monkeypatch):
    stored = random_values()
    stored[[3, 11, 17]] = stored[2]
    cache = cache_of(tmp_path / "cache", stored)
    expected = stats(cache)
    assert expected["nearly_equal_pairs"] == 6
    monkeypatch.setattr("llava_twophase.inspection.statistics._BLOCK_VALUES", 60)  # three rows at once
    found = stats(cache)
    for values in (expected, found):
        values["nearly_equal_images"] = [pair[:2] for pair in values["nearly_equal_images"]]
    assert found == {**expected, "nearest_image_cosine": pytest.approx(expected["nearest_image_cosine"])}


def test_many_nearly_equal_pairs_are_counted_and_some_listed(tmp_path):
    stored = random_values(40)
    stored[:30] = stored[0]
    values = stats(cache_of(tmp_path / "cache", stored))
    assert values["nearly_equal_pairs"] == 30 * 29 / 2 and len(values["nearly_equal_images"]) == 100
